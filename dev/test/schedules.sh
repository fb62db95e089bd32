#!/bin/bash
# Runs a program of the CPU device under every schedule: each must succeed, and print the lines that match PATTERN with the
# same bytes as under the natural schedule. Prints one line a schedule, and the counts.
#   dev/test/schedules.sh PATTERN PROGRAM [ARGUMENT...]
set -u
pattern=$1
shift
natural=
passed=0
failed=0
for schedule in natural reversed last-in random:1 random:2 random:3; do
    output=$(CPU_SCHEDULE=$schedule timeout 600 "$@" 2>&1)
    code=$?
    lines=$(echo "$output" | grep -E "$pattern")
    if [ $schedule = natural ]; then natural=$lines; fi
    if [ $code -eq 0 ] && [ -n "$lines" ] && [ "$lines" = "$natural" ]; then
        echo "ok   $schedule: $(basename "$1")"
        passed=$((passed + 1))
    else
        echo "FAIL $schedule: $(basename "$1"): exit code $code, $(echo "$lines" | head -n 3); expected $(echo "$natural" | head -n 3)"
        echo "$output" | grep FAIL | head -n 5
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
