#!/bin/bash
# Do the tests find mistakes? dev/test/mutants.txt lists mutants: single changes of train_deit.cu, each a mistake that
# somebody could make, with the test that must then fail. All are built into one copy of the tree, in which the
# environment variable MUTANT chooses one by its number. Each test must pass without a mutant, and fail with it. Prints
# a line a mutant, with the first check that failed, and the counts. It is not a part of `make test`: it takes ten to
# twenty minutes on two cores.
#   dev/test/mutants.sh            all mutants
#   dev/test/mutants.sh NAME ...   these
set -u
cd "$(dirname "$0")/../.." || exit 1
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
bin=build/cpu-fp32
git ls-files -z | xargs -0 cp --parents -t "$tree"

# Writes the trainer with all mutants, and a list of them: number, name, test. An expression becomes a choice of two, a
# statement (it ends with ; or }) an if with two branches
awk -v list="$tree/list" '
    function mutate(n, name, old, new,    part, point, text, place) {
        if (split(old, part, "`") == 1) { part[2] = part[1]; part[1] = part[3] = "" }
        point = part[2]
        text = part[1] point part[3]
        place = index(source, text)
        if (!place || index(substr(source, place + 1), text)) {
            where = place ? "more than once" : "nowhere, or overlaps that of a mutant above,"
            printf "%s: its text stands %s in train_deit.cu:\n%s\n", name, where, text >"/dev/stderr"
            wrong = 1
            return
        }
        place += length(part[1])
        text = point ~ /[;}]$/ ? "if (MUTANT(" n ")) { " new " } else { " point " }" \
                               : "(MUTANT(" n ") ? (" new ") : (" point "))"
        source = substr(source, 1, place - 1) text substr(source, place + length(point))
    }
    function finish() { if (name != "") mutate(n, name, old, new); name = old = new = "" }
    BEGIN { RS = "\001"; getline source <"train_deit.cu"; RS = "\n" }
    /^-/ { old = old (old == "" ? "" : "\n") substr($0, 3) }
    /^\+/ { new = new (new == "" ? "" : "\n") substr($0, 3) }
    /^[a-z_0-9]+: / {
        finish()
        name = substr($1, 1, length($1) - 1)
        print ++n, name, substr($0, length($1) + 2) >list
    }
    END {
        finish()
        place = index(source, "\nnamespace cg")
        printf "%s#define MUTANT(n) (mutant == (n))\n", substr(source, 1, place)
        printf "static const int mutant = getenv(\"MUTANT\") != NULL ? atoi(getenv(\"MUTANT\")) : 0; // 0: none"
        printf "%s", substr(source, place)
        exit wrong
    }' dev/test/mutants.txt >"$tree/train_deit.cu" || exit 1
cd "$tree" || exit 1
while read -r number name test; do
    if [ $# = 0 ] || [[ " $* " == *" $name "* ]]; then echo "$number $name $test"; fi
done <list >chosen
if ! command -v mpirun >/dev/null && grep -q ' ranks$' chosen; then
    echo "not run, since there is no MPI here:$(sed -n 's/^[0-9]* \(.*\) ranks$/ \1/p' chosen | tr -d '\n')"
    sed -i '/ ranks$/d' chosen
fi

[ -s chosen ] || { echo 'no such mutant' >&2; exit 1; }

program_of() { # program_of TEST
    case $1 in
        deit) echo $bin/test_deit ;;
        second_model) echo $bin/dev/test/second_model ;;
        cli | checkpoint | finetune | ranks) echo $bin/train_deit ;;
        *) echo "$bin/dev/test/test_$1" ;;
    esac
}
run_test() { # run_test MUTANT TEST [DUMP]; a shell test ends at its first failure
    local program command
    program=$(program_of "$2")
    command=$program
    [ ! -e "dev/test/$2.sh" ] || command="dev/test/$2.sh $program"
    export MUTANT=$1 STOP_AT_FAILURE=1
    { timeout 600 $command ${3:+dev/reference/dumps/$3.safetensors} </dev/null; } >"log.$1.$2.${3:-}" 2>&1
}
judge() { # judge NUMBER NAME TEST [DUMP]
    local start=$SECONDS word=killed why
    [ -e "passes.$3.${4:-}" ] || { echo "NOT RUN  $2: $3 ${4:-} fails without it"; return; }
    run_test "$1" "$3" "${4:-}" && word=SURVIVES
    why=$(grep -am 1 -E '^(NOT OK|error)|Abort|fault|Assert' "log.$1.$3.${4:-}" | cut -c 1-100)
    printf '%-8s %-27s %3d s  %s\n' $word "$2" $((SECONDS - start)) "$3${4:+ $4}: $why"
}
in_parallel() { # in_parallel FUNCTION: calls it for each line of words of the standard input
    while read -r line; do
        [ "$(jobs -rp | wc -l)" -lt "$(nproc)" ] || wait -n
        "$1" $line &
    done
    wait
}
without_mutant() { # without_mutant TEST [DUMP]
    local start=$SECONDS
    if run_test 0 "$@"; then touch "passes.$1.${2:-}"
    else
        echo "without a mutant, this test fails: $*"
        tail -n 5 "log.0.$1.${2:-}"
    fi
    echo "no mutant $((SECONDS - start)) s  $*"
}

programs=$(cut -d ' ' -f 3 chosen | sort -u | while read -r test; do program_of "$test"; done | sort -u)
build="${MAKE:-make} --no-print-directory -s -j $(nproc) DEVICE=cpu PRECISION=FP32 OPTIMIZE=-O1 WARNINGS=-w"
$build $programs || exit 1
echo "built after $SECONDS s"
cut -d ' ' -f 3- chosen | sort -u | in_parallel without_mutant
in_parallel judge <chosen | tee results
killed=$(grep -c ^killed results)
echo "$killed of $(grep -c '' chosen) mutants are killed, after $SECONDS s"
[ "$killed" -gt 0 ] && [ "$killed" = "$(grep -c '' chosen)" ]
