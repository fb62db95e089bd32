#!/bin/bash
# The checks of the workbench's programs (dev/cuda), two at a time, each under the given schedules of the CPU device;
# prints what is not right and the counts of all.
#   dev/test/workbench.sh PROGRAM [SCHEDULE ...]     build/cpu-bf16/dev/test/workbench natural reversed; default: natural
set -u
cd "$(dirname "$0")/../.." || exit 1
program=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for source in dev/cuda/*.cu; do
    for schedule in "${@:-natural}"; do echo "$(basename "$source" .cu) $schedule"; done
done >"$work/list"
xargs -P 2 -L 1 bash -c 'CPU_SCHEDULE=$4 timeout 300 "$1" "$3" >"$2/$3 $4" 2>&1; echo "$?" >"$2/$3 $4.code"' \
    - "$program" "$work" <"$work/list"
passed=0
failed=0
while read -r name schedule; do
    log="$work/$name $schedule"
    read -r p f < <(sed -nE '$s/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$log")
    [ "$(cat "$log.code")" = 0 ] || [ "${f:-0}" -gt 0 ] || f=1
    [ -n "${p:-}" ] || { p=0 f=1; }
    if [ "$f" -gt 0 ]; then
        echo "NOT OK $name, $schedule: exit code $(cat "$log.code")"
        grep -E 'NOT OK|error|WARNING|ERROR' "$log" | head -n 5
    fi
    passed=$((passed + p))
    failed=$((failed + f))
done <"$work/list"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
