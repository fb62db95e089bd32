#!/bin/sh
# Trainers are self-contained: no #include "...", and what two of them need stands in both, as the same bytes, between
#     // ---- shared: NAME ---     and     // ---- end shared: NAME ---
#   dev/test/check_shared.sh                    fails when two copies differ, a marker is wrong, a section stands in one file only
#                                               (from the second trainer on), or there are none
#   dev/test/check_shared.sh train_deit.cu      copies that file's sections into the other trainers   (make sync FROM=train_deit.cu)
set -u
from=${1:-}
files=$(ls train_*.cu 2>/dev/null)
[ -n "$files" ] || { echo "error: no train_*.cu here; run from the root of the repository" >&2; exit 1; }
[ -z "$from" ] || [ -f "$from" ] || { echo "error: there is no $from; give one of: $files" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# writes the section NAME of FILE to $work/FILE/NAME, complains about markers
for file in $files; do
    mkdir "$work/$file"
    awk -v dir="$work/$file" '
        function bad(why) { printf "NOT OK %s:%d: %s\n", FILENAME, FNR, why; failed = 1 }
        /^\/\/ -+ (end )?shared: [^-]+ -+$/ {
            name = $0; sub(/^\/\/ -+ (end )?shared: /, "", name); sub(/ -+$/, "", name)
            if ($0 !~ /end shared/) {
                if (open != "") bad(name " begins inside " open)
                if (name in seen) bad(name " begins twice")
                open = name; seen[name] = 1; path = dir "/" name; printf "" > path
            } else {
                if (open != name) bad("end of " name ", but " (open == "" ? "nothing" : open) " is open")
                open = ""; close(path)
            }
            next
        }
        /^[ \t]*\/\/.*----.*shared:/ { bad("looks like a marker but is not one: " $0) }
        /^[ \t]*#[ \t]*include[ \t]*"/ { bad("a trainer includes no file of the repository: " $0) }
        open != "" { print > path }
        END { if (open != "") bad(open " is never ended"); exit failed }' "$file" || touch "$work/failed"
done

names=$(for file in $files; do ls "$work/$file"; done | sort -u)
[ -n "$names" ] || { echo "NOT OK no shared sections were found: were the markers renamed?"; exit 1; }
[ ! -e "$work/failed" ] || exit 1

if [ -n "$from" ]; then
    for file in $files; do
        [ "$file" != "$from" ] || continue
        awk -v dir="$work/$from" '
            /^\/\/ -+ end shared: / { skip = 0 }
            !skip { print }
            /^\/\/ -+ shared: / {
                name = $0; sub(/^\/\/ -+ shared: /, "", name); sub(/ -+$/, "", name)
                path = dir "/" name
                if ((getline line < path) > 0) { do print line; while ((getline line < path) > 0); close(path); skip = 1 }
            }' "$file" >"$work/new" && cat "$work/new" >"$file" && echo "synced $file from $from"
    done
    exit 0
fi

passed=0
failed=0
count=$(echo "$files" | wc -l)
IFS='
'
for name in $names; do
    copies=0
    first=
    same=yes
    for file in $files; do
        [ -e "$work/$file/$name" ] || continue
        copies=$((copies + 1))
        if [ -z "$first" ]; then first=$file; elif ! cmp -s "$work/$first/$name" "$work/$file/$name"; then
            same=no
            echo "NOT OK $name: $first and $file differ: $(cmp "$work/$first/$name" "$work/$file/$name")"
        fi
    done
    if [ "$count" -gt 1 ] && [ $copies = 1 ]; then same=no; echo "NOT OK $name stands in $first alone: drop the markers or share it"; fi
    if [ $same = yes ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
