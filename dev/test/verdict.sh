# What the shell tests of a trainer count; to be sourced. $work is a directory that goes when the test ends
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failed=0

verdict() { # verdict 0|1 TEXT
    if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "NOT OK $2"; fi
    [ "$1" = 0 ] || [ -z "${STOP_AT_FAILURE:-}" ] || exit 1
}
