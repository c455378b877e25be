#!/usr/bin/env bash
# Everything that needs a GPU, in one command: parity tests, compute-sanitizer, benches; a short table last.
#
#   scripts/gpu_check.sh [--bin DIR] [--no-tests] [--no-sanitize] [--no-bench] [--quick] [--only NAME]
#
# --bin DIR   use the binaries in DIR (and shared libraries in DIR/lib); without it they are built in build/gpu (needs nvcc, cmake)
# --only NAME run only dsv4_tests_gpu_NAME and dsv4_bench_gpu_NAME
# Every binary named dsv4_tests_gpu_* and dsv4_bench_gpu_* is run. JSON and logs go to $OUT if set, else docs/results/.
# Sanitizers (memcheck, racecheck, initcheck) run the small cases: the gtest filter in tests/gpu/<binary>.sanitize (or beside the
# binary), or every test but those named *Exhaustive* when there is none.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
bin= tests=1 sanitize=1 bench=1 quick= only=
while [ $# -gt 0 ]; do
  case $1 in
    --bin) bin=$2; shift ;;
    --no-tests) tests= ;;
    --no-sanitize) sanitize= ;;
    --no-bench) bench= ;;
    --quick) quick=--quick ;;
    --only) only=$2; shift ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "$bin" ]; then
  bin=$root/build/gpu/bin
  cmake -S "$root" -B "$root/build/gpu" -DDSV4_CUDA=ON -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$bin" || exit 3
  cmake --build "$root/build/gpu" -j || exit 3
fi
out=${OUT:-$root/docs/results}
mkdir -p "$out"
[ -d "$bin/lib" ] && export LD_LIBRARY_PATH="$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

failed=0
summary=()
run() {  # run NAME COMMAND...: its log, one summary line, the exit status counted
  local name=$1 log start status
  shift
  log=$out/$(echo "$name" | tr ' ' '_').log
  start=$SECONDS
  "$@" >"$log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    summary+=("ok    $name ($((SECONDS - start)) s) $(grep -aE '^\[  (PASSED|SKIPPED) ' "$log" | head -2 | tr '\n' ' ')")
  else
    summary+=("FAIL  $name: exit $status, $log")
    failed=1
    grep -aE 'Failure|FAILED|ERROR|Error|error|differ' "$log" | head -15
  fi
}

shopt -s nullglob
if [ -n "$tests" ]; then
  for test in "$bin"/dsv4_tests_gpu_${only:-*}; do
    [ -x "$test" ] && [[ $test != *.sanitize ]] && run "$(basename "$test")" "$test" --gtest_brief=1
  done
fi
if [ -n "$sanitize" ]; then
  if command -v compute-sanitizer >/dev/null; then
    for test in "$bin"/dsv4_tests_gpu_${only:-*}; do
      [ -x "$test" ] && [[ $test != *.sanitize ]] || continue
      filter='-*Exhaustive*'
      for list in "$root/tests/gpu/$(basename "$test").sanitize" "$test.sanitize"; do
        [ -f "$list" ] && filter=$(cat "$list")
      done
      for tool in memcheck racecheck initcheck; do
        run "$tool $(basename "$test")" timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" --gtest_brief=1 --gtest_filter="$filter"
      done
    done
  else
    summary+=("----  compute-sanitizer is not installed: not run")
  fi
fi
if [ -n "$bench" ]; then
  for binary in "$bin"/dsv4_bench_gpu_${only:-*}; do
    [ -x "$binary" ] || continue
    run "$(basename "$binary")" "$binary" $quick --json "$out/$(basename "$binary").json"
    cat "$out/$(basename "$binary").log"
  done
fi
echo "---- summary"
printf '%s\n' "${summary[@]}"
exit $failed
