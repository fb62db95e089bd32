#!/bin/sh
# Trainers are self-contained: no #include "...", and what two of them need stands in both, as the same bytes, between
#     // ---- shared: NAME ---     and     // ---- end shared: NAME ---
#   dev/test/check_shared.sh                 fails when two copies differ, a marker is wrong, a section stands in one
#                                            file only (from the second trainer on) or in another order than in another
#                                            file, a trainer is not laid out as below, or a section names a model
#   dev/test/check_shared.sh --self-test     plants a mistake of each kind into copies: each must be found
#   dev/test/check_shared.sh train_deit.cu   copies that file's sections into the other trainers (make sync FROM=...)
#
# A trainer is: a header comment, the sections base and interface, the model with its two tables, the section training
# with main(), the model's kernels, and then nothing but other shared sections. The code of a shared section names no
# model; a comment there may cite one ("DeiT's RASampler"), in that form alone.
set -u
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
from=${1:-}
files=$(ls train_*.cu 2>/dev/null)
[ -n "$files" ] || { echo "error: no train_*.cu here; run from the root of the repository" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failed=0

# found NAME PATTERN FILE SED-COMMAND...: the mistake that the commands make in a copy of the file (one and two are the
# same trainer) is found, and said in a line with PATTERN
found() {
    name=$1 pattern=$2 file=$3
    shift 3
    rm -rf "$work/copy" && mkdir "$work/copy"
    for copy in one two; do cp "$first_file" "$work/copy/train_$copy.cu"; done
    for command; do sed -i "$command" "$work/copy/$file"; done
    if cmp -s "$first_file" "$work/copy/$file"; then problem="nothing was planted"
    elif (cd "$work/copy" && sh "$script") >"$work/said" 2>&1; then problem="it is not found"
    elif ! grep -q "^NOT OK.*$pattern" "$work/said"; then problem="another sentence: $(head -n 3 "$work/said")"
    else passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "NOT OK planted: $name: $problem"
}

self_test() {
    first_file=$(pwd)/$(echo "$files" | head -n 1)
    mkdir "$work/clean"
    for copy in one two; do cp "$first_file" "$work/clean/train_$copy.cu"; done
    if (cd "$work/clean" && sh "$script") >"$work/said" 2>&1; then passed=1
    else failed=1; echo "NOT OK copies as they are: $(head -n 3 "$work/said")"; fi
    two=train_two.cu
    base='shared: base -' interface='shared: interface -' training='shared: training -' random='shared: random -'
    found "a byte" 'base: .* differ' $two "/^\/\/ -* $base/a\\ "
    found "a section in one file alone" 'extra stands in train_two.cu alone' $two \
        "\$a// ---- shared: extra ---" "\$a// ---- end shared: extra ---"
    found "no header" 'the header comment' $two '1i#define FIRST'
    found "an include" 'includes no file' $two '/#include <math.h>/a#include "common.h"'
    found "a marker without an end" 'is never ended' $two '$a// ---- shared: last ---'
    found "a section inside another" 'begins inside' $two "/^\/\/ -* end $base/d"
    found "a section twice" 'begins twice' $two '$a// ---- shared: random ---' '$a// ---- end shared: random ---'
    found "a marker with a slip" 'looks like a marker' $two 's/^\/\/ \(-* shared: random\)/  \/\/ \1/'
    found "base after interface" 'the first section is' $two "s/$base/shared: x -/" "s/$interface/$base/" \
        "s/shared: x -/$interface/"
    found "training behind the machinery" 'the third section is' $two "s/$training/shared: x -/" \
        "s/$random/$training/" "s/shared: x -/$random/"
    found "a table behind training" 'PARAMETERS stands behind' $two '/^#define PARAMETERS(X)/d' \
        "/^\/\/ -* end $training/a#define PARAMETERS(X)"
    found "a model without activations" 'ACTIVATIONS is missing' $two 's/^#define ACTIVATIONS(X)/#define TENSORS(X)/'
    found "main() behind training" 'main() stands outside' $two "/^\/\/ -* end $training/aint main(void) {}"
    found "no main()" 'main() is missing' $two 's/^int main(/int start(/'
    found "a kernel in the model" 'kernels of the model stand behind' $two \
        "/^\/\/ -* end $interface/a__global__ void k() {}"
    found "a kernel among the machinery" 'code of its own' $two "/^\/\/ -* end $random/a__global__ void k() {}"
    found "code behind the last section" 'code of its own' $two '$aint last;'
    found "another order" 'another order' $two 's/shared: linear -/shared: x -/' 's/shared: loss -/shared: linear -/' \
        's/shared: x -/shared: loss -/'
    for line in 'int deit_tokens;' 'struct RcnnHeads {};' 'int last_vit;' 'struct MyViT {};' 'f("for ResNet");' \
        '// (ResNet: none)' 'f(a); // of R-CNN'; do
        found "a name in: $line" 'names a model' $two "/^\/\/ -* $random/a$line"
    done
    # what is allowed: a citation in a comment, and words that only hold the letters
    allowed="int gravity, activity; // as DeiT's code has it, and ViT's paper"
    sed -i "/^\/\/ -* $random/a$allowed" "$work"/clean/train_*.cu
    if (cd "$work/clean" && sh "$script") >"$work/said" 2>&1; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "NOT OK a citation is refused: $(head -n 3 "$work/said")"; fi
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
}

if [ "$from" = --self-test ]; then self_test; exit; fi
[ -z "$from" ] || [ -f "$from" ] || { echo "error: there is no $from; give one of: $files" >&2; exit 1; }

# writes the section NAME of FILE to $work/FILE/NAME and their order to $work/FILE.order; complains about markers,
# layout and names
for file in $files; do
    mkdir "$work/$file"
    awk -v dir="$work/$file" '
        function bad(why) { printf "NOT OK %s:%d: %s\n", FILENAME, FNR, why; failed = 1 }
        # vit is a word, or one of CamelCase: activity has the letters too
        function names_model(text) {
            if (tolower(text) ~ /deit|resnet|r-?cnn/) return 1
            return text ~ /(^|[^A-Za-z])[Vv][Ii][Tt]([^a-z]|$)/ || text ~ /[a-z]Vi[Tt]([^a-z]|$)/
        }
        FNR == 1 && !/^\/\*/ { bad("a trainer begins with the header comment") }
        /^\/\/ -+ (end )?shared: [^-]+ -+$/ {
            name = $0; sub(/^\/\/ -+ (end )?shared: /, "", name); sub(/ -+$/, "", name)
            if ($0 !~ /end shared/) {
                if (open != "") bad(name " begins inside " open)
                if (name in seen) bad(name " begins twice")
                open = name; seen[name] = 1; path = dir "/" name; printf "" > path
                print name > (dir ".order")
                count++
                if (count == 1 && name != "base") bad("the first section is " name ", not base")
                if (count == 2 && name != "interface") bad("the second section is " name ", not interface")
                if (count == 3 && name != "training") bad("the third section is " name ", not training")
            } else {
                if (open != name) bad("end of " name ", but " (open == "" ? "nothing" : open) " is open")
                open = ""; close(path)
            }
            next
        }
        /^[ \t]*\/\/.*----.*shared:/ { bad("looks like a marker but is not one: " $0) }
        /^[ \t]*#[ \t]*include[ \t]*"/ { bad("a trainer includes no file of the repository: " $0) }
        /^int main\(/ && open == "training" { main_found = 1 }
        /^int main\(/ && open != "training" { bad("main() stands outside of the section training") }
        open == "" && /^#define (PARAMETERS|ACTIVATIONS)\(X\)/ {
            table = $2; sub(/\(X\)/, "", table); tables[table] = 1
            if (count != 2) bad("the table " table " stands behind the section training, or before interface")
        }
        open == "" && /__global__/ && count < 3 { bad("kernels of the model stand behind the section training") }
        open == "" && NF > 0 && (count == 1 || count > 3) { bad("code of its own among shared sections: " $0) }
        open != "" {
            print > path
            comment = match($0, /(^|[ \t])\/\//) ? substr($0, RSTART) : ""
            code = comment != "" ? substr($0, 1, RSTART - 1) : $0
            cited = comment; gsub(/[A-Za-z-]+\047s /, "", cited)
            if (names_model(code) || names_model(cited)) bad("the section " open " names a model: " $0)
        }
        END {
            if (open != "") bad(open " is never ended")
            if (count > 0 && !main_found) bad("main() is missing in the section training")
            if (count > 0 && !("PARAMETERS" in tables)) bad("the table PARAMETERS is missing")
            if (count > 0 && !("ACTIVATIONS" in tables)) bad("the table ACTIVATIONS is missing")
            exit failed
        }' "$file" || touch "$work/failed"
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
                if ((getline line < path) > 0) {
                    do print line; while ((getline line < path) > 0)
                    close(path)
                    skip = 1
                }
            }' "$file" >"$work/new" && cat "$work/new" >"$file" && echo "synced $file from $from"
    done
    exit 0
fi

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
    if [ "$count" -gt 1 ] && [ $copies = 1 ]; then
        same=no
        echo "NOT OK $name stands in $first alone: drop the markers or share it"
    fi
    if [ $same = yes ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
# of two files, the sections that both have
for one in $files; do
    for other in $files; do
        [ "$one" \< "$other" ] || continue
        grep -Fxf "$work/$other.order" "$work/$one.order" >"$work/one"
        grep -Fxf "$work/$one.order" "$work/$other.order" >"$work/other"
        if cmp -s "$work/one" "$work/other"; then passed=$((passed + 1)); else
            failed=$((failed + 1))
            echo "NOT OK $one and $other have another order of sections: $(diff "$work/one" "$work/other" | sed -n 2p)"
        fi
    done
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
