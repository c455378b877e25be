#!/usr/bin/env bash
# Everything that needs a GPU, in one command: parity tests, compute-sanitizer, benches; a short table last.
#
#   scripts/gpu_check.sh [--bin DIR] [--no-tests] [--no-sanitize] [--no-bench] [--quick] [--only NAME] [--jobs N]
#
# --bin DIR   use the binaries in DIR (and shared libraries in DIR/lib; the commit they were built from in DIR/COMMIT); without it they are built in build/gpu for this machine's card
#             (needs cmake, nvcc and the packages of cmake/Dsv4Dependencies.cmake; says what is missing before it builds anything)
# --only NAME build and run only dsv4_tests_gpu_NAME and dsv4_bench_gpu_NAME, where they exist
# --jobs N    sanitizer runs at a time (half the processors: they are bound by the host); tests and benches have the card to themselves
# The wheel DIR/dsv4-*.whl (docs/python.md) that fits this machine's python3 is installed into a folder of its own and tested with PyTorch.
# Every binary named dsv4_tests_gpu_* and dsv4_bench_gpu_* is run. JSON and logs go to $OUT if set, else to docs/results/ and build/gpu/logs/;
# gpu_check.json has the date, the card and what passed; each bench's JSON has the ceilings of its run (copy, read; the MoE bench also
# BF16 8192^3 by cuBLASLt). A step in which no test passed, or one was skipped for want of a GPU or of kernels for it, has failed.
# Sanitizers (memcheck, racecheck, initcheck) run the small cases: each line of tests/gpu/<binary>.sanitize (or beside the binary) is the
# gtest filter of a process, or every test but those named *Exhaustive* when there is none.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
bin='' built='' tests=1 sanitize=1 bench=1 quick='' only='' jobs=$((($(nproc) + 1) / 2))
while [ $# -gt 0 ]; do
  case $1 in --bin | --only | --jobs) [ -n "${2-}" ] || { echo "$1 needs a value" >&2; exit 2; } ;; esac
  case $1 in
    --bin) bin=$2; shift ;;
    --no-tests) tests= ;;
    --no-sanitize) sanitize= ;;
    --no-bench) bench= ;;
    --quick) quick=--quick ;;
    --only) only=$2; shift ;;
    --jobs) jobs=$2; shift ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
  shift
done
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "--jobs $jobs: expected a positive number" >&2; exit 2; }
if [ -z "$bin" ]; then
  bin=$root/build/gpu/bin
  missing=()
  for tool in cmake nvcc c++ pkg-config; do command -v $tool >/dev/null || missing+=("$tool"); done
  if command -v c++ >/dev/null; then
    while read -r header package; do
      echo "#include <$header>" | c++ -x c++ -std=c++20 -DPCRE2_CODE_UNIT_WIDTH=8 -E - >/dev/null 2>&1 || missing+=("$header ($package)")
    done <<'LIST'
fmt/core.h libfmt-dev
nlohmann/json.hpp nlohmann-json3-dev
CLI/CLI.hpp libcli11-dev
pcre2.h libpcre2-dev
gtest/gtest.h libgtest-dev
LIST
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    echo "cannot build here, missing: $(printf '%s, ' "${missing[@]}" | sed 's/, $//'). Build elsewhere and give --bin DIR." >&2
    exit 3
  fi
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  cmake -S "$root" -B "$root/build/gpu" -DDSV4_CUDA=ON ${capability:+-DDSV4_CUDA_ARCHS=${capability}a} -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$bin" || exit 3
  targets=$(cmake --build "$root/build/gpu" --target help | grep -oE "dsv4_(tests|bench)_gpu_${only:-[a-z_]+}\b" | sort -u)
  [ -n "$targets" ] || { echo "no target dsv4_tests_gpu_$only or dsv4_bench_gpu_$only" >&2; exit 2; }
  # shellcheck disable=SC2086
  cmake --build "$root/build/gpu" -j "$(nproc)" --target $targets || exit 3
  built=1
fi
if ! compgen -G "$bin/dsv4_tests_gpu_${only:-*}" >/dev/null && ! compgen -G "$bin/dsv4_bench_gpu_${only:-*}" >/dev/null; then
  echo "$bin: expected dsv4_tests_gpu_${only:-*} or dsv4_bench_gpu_${only:-*}, found neither" >&2
  exit 2
fi
out=${OUT:-$root/docs/results} logs=${OUT:-$root/build/gpu/logs}
mkdir -p "$out" "$logs"
[ -d "$bin/lib" ] && export LD_LIBRARY_PATH="$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# The checkout beside carried binaries may be another: these say themselves where they come from.
commit=$(if [ -n "$built" ]; then git -C "$root" describe --always --dirty; else cat "$bin/COMMIT"; fi 2>/dev/null || echo unknown)

failed=0
summary=() steps=()
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log_of() { echo "$logs/$(echo "$1" | tr ' ' '_').log"; }
start() {  # start NAME COMMAND...: its log; status and seconds in $scratch, and at once on the screen: a run may be cut short
  local name=$1 begin=$SECONDS status
  shift
  "$@" >"$(log_of "$name")" 2>&1
  status=$?
  echo "$status $((SECONDS - begin))" >"$scratch/$name"
  echo "$name: exit $status after $((SECONDS - begin)) s"
}
count() { grep -aoE "$1" "$2" | tail -1 | grep -oE '[0-9]+'; }  # count PATTERN LOG: the number in its last match
finish() {  # finish NAME: one summary line; fails on the exit status and when nothing was tested
  local name=$1 log status seconds why='' passed skipped counts=''
  log=$(log_of "$name")
  read -r status seconds <"$scratch/$name"
  [ "$status" -eq 0 ] || why="exit $status"
  if [[ $name != dsv4_bench_* && $name != "python wheel" ]]; then
    passed=$(count '^\[  PASSED  \] [0-9]+ test|[0-9]+ passed' "$log")
    skipped=$(count '^\[  SKIPPED \] [0-9]+ test|[0-9]+ skipped' "$log")
    counts=", \"passed\": ${passed:=0}, \"skipped\": ${skipped:=0}"
    [ "$passed" -gt 0 ] || why=${why:-no test passed}
    ! grep -qaE '^no (GPU: |kernels for )' "$log" || why=${why:-$(grep -aE '^no (GPU: |kernels for )' "$log" | head -1)}
  fi
  if [ -z "$why" ]; then
    summary+=("ok    $name ($seconds s)${passed:+ $passed passed, $skipped skipped}")
    steps+=("{\"step\": \"$name\", \"ok\": true, \"seconds\": $seconds$counts}")
  else
    summary+=("FAIL  $name: $why, $log")
    steps+=("{\"step\": \"$name\", \"ok\": false, \"seconds\": $seconds$counts}")
    failed=1
    grep -aE 'Failure|FAILED|ERROR|Error|error|differ' "$log" | head -15
  fi
}
run() {
  start "$@"
  finish "$1"
}

shopt -s nullglob
if [ -n "$tests" ]; then
  for test in "$bin"/dsv4_tests_gpu_${only:-*}; do
    [ -x "$test" ] && [[ $test != *.sanitize ]] && run "$(basename "$test")" "$test" --gtest_brief=1
  done
fi
if [ -n "$tests" ] && [ -z "$only" ]; then
  tag=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])' 2>/dev/null)
  wheels=("$bin"/dsv4-*.whl) fitting=("$bin"/dsv4-*-"${tag:-no-python}"-*.whl)
  if [ ${#fitting[@]} -gt 0 ]; then
    run "python wheel" python3 -m pip install -q --no-index --no-deps --target "$scratch/site" "${fitting[-1]}"
    if [ -d "$scratch/site/dsv4" ]; then
      PYTHONPATH=$scratch/site run "python with torch" python3 -m pytest -q -rs -p no:cacheprovider "$root/tests/python/test_torch.py"
      tail -3 "$(log_of "python with torch")"
    fi
  else
    summary+=("----  of ${#wheels[@]} wheel(s) in $bin none is for this python3 (${tag:-there is none}): Python not run")
  fi
fi
if [ -n "$sanitize" ]; then
  if command -v compute-sanitizer >/dev/null; then
    names=()
    for test in "$bin"/dsv4_tests_gpu_${only:-*}; do
      if ! [ -x "$test" ] || [[ $test == *.sanitize ]]; then continue; fi
      filters=('-*Exhaustive*')
      for list in "$root/tests/gpu/$(basename "$test").sanitize" "$test.sanitize"; do
        [ -f "$list" ] && mapfile -t filters <"$list"
      done
      for tool in racecheck memcheck initcheck; do  # the slowest first
        for i in "${!filters[@]}"; do
          name="$tool $(basename "$test")$([ ${#filters[@]} -eq 1 ] || echo " $((i + 1))")"
          names+=("$name")
          while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
          start "$name" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" --gtest_brief=1 --gtest_filter="${filters[i]}" &
        done
      done
    done
    wait
    for name in "${names[@]}"; do finish "$name"; done
  else
    summary+=("----  compute-sanitizer is not installed: not run")
  fi
fi
if [ -n "$bench" ]; then
  for binary in "$bin"/dsv4_bench_gpu_${only:-*}; do
    [ -x "$binary" ] || continue
    run "$(basename "$binary")" "$binary" $quick --json "$out/$(basename "$binary").json"
    cat "$(log_of "$(basename "$binary")")"
  done
fi
{
  echo "{\"date\": \"$(date -u +%FT%TZ)\", \"device\": \"$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)\","
  echo " \"driver\": \"$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)\", \"commit\": \"$commit\","
  echo " \"steps\": [$(printf '%s,\n  ' "${steps[@]}" | sed '$d' | sed '$s/,$//')]}"
} >"$out/gpu_check.json"
echo "---- summary"
printf '%s\n' "${summary[@]}"
exit $failed
