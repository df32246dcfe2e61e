#!/usr/bin/env bash
# Everything that needs a GPU, on one of them, in at most 25 minutes: results go to benchmarks/results/<device>.json.
#
#   benchmarks/gpu.sh                      all stages: versions tests layer dispatch model train
#   benchmarks/gpu.sh layer model          some of them; speed = layer dispatch model
#   benchmarks/gpu.sh --device cpu --small try the scripts without a GPU; writes nothing to benchmarks/results
#   benchmarks/gpu.sh --plan SLUG NAME     write the results file of a device with every missing cell "not measured"
#   benchmarks/gpu.sh --render             print the tables and put them into docs/gpu.md
#
# PYTHON=python3 is the interpreter (no environment is assumed); WHEELS=folder installs the wheels in it, without a
# network, into a folder of their own; PEERS=folder holds checkouts of libraries to compare with (benchmarks/peers);
# GPU_RESULTS_DIR=folder takes the results elsewhere; GPU_COMMIT names the commit where there is no git. A stage that
# fails or runs out of time leaves its cells "failed" and does not stop the others; one that runs alone has 9.5 minutes.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
PYTHON=${PYTHON:-python3}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # one GPU, also where there are more
device=cuda small=() stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?--device needs cuda or cpu}; shift ;;
    --small) small=(--small) ;;
    --plan) exec "$PYTHON" benchmarks/gpu_results.py plan "${2:?--plan SLUG NAME}" "${3:?--plan SLUG NAME}" ;;
    --render) exec "$PYTHON" benchmarks/gpu_results.py render ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    speed) stages+=(layer dispatch model) ;;
    versions | tests | layer | dispatch | model | train) stages+=("$1") ;;
    *) echo "benchmarks/gpu.sh: unknown word '$1' (stages: versions tests layer dispatch model train, or speed)" >&2; exit 2 ;;
  esac
  shift
done
[ ${#stages[@]} -gt 0 ] || stages=(versions tests layer dispatch model train)
logs=$(mktemp -d)
if [ "$device" = cpu ]; then
  export GPU_RESULTS_DIR=${GPU_RESULTS_DIR:-$logs/results}
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$logs/wheels" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$logs/wheels" # these come before the interpreter's own: put only what is missing there
fi
name=$("$PYTHON" benchmarks/gpu_stages.py device "$device") || exit 1

limit() { # seconds of a stage: 24.7 minutes in all
  [ ${#stages[@]} -gt 1 ] || { echo 570; return; }
  case $1 in
    versions) echo 40 ;; tests) echo 300 ;; layer) echo 300 ;; dispatch) echo 60 ;; model) echo 540 ;; train) echo 240 ;;
  esac
}
command_of() {
  case $1 in
    layer) echo benchmarks/moe_layer.py ;;
    dispatch) echo benchmarks/dispatch.py ;;
    model) echo benchmarks/step.py ;;
    *) echo "benchmarks/gpu_stages.py $1" ;;
  esac
}
bad=""
for stage in "${stages[@]}"; do
  echo "== $stage on $name"
  export GPU_RECORDED="$logs/$stage.recorded"
  GPU_SECONDS=$(($(limit "$stage") - 20)) # by when it has tried and measured what it can; its start is in the 20
  export GPU_SECONDS
  # shellcheck disable=SC2046
  timeout -k 10 "$(limit "$stage")" "$PYTHON" $(command_of "$stage") "$device" "$name" ${small[@]+"${small[@]}"} 2>&1 |
    tee "$logs/$stage.log"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    bad="$bad $stage"
    why="exit code $code: $(tail -n 4 "$logs/$stage.log" | tr '\n' ' ')"
    [ "$code" -eq 124 ] && why="did not finish in $(limit "$stage") s; last: $(tail -n 2 "$logs/$stage.log" | tr '\n' ' ')"
    "$PYTHON" benchmarks/gpu_results.py fail "$name" "$stage" "$why"
  fi
done
echo
"$PYTHON" benchmarks/gpu_results.py show "$("$PYTHON" -c '
import sys; sys.path.insert(0, "benchmarks"); import gpu_results; print(gpu_results.path_of(sys.argv[1]))' "$name")"
[ -z "$bad" ] || { echo "failed:$bad"; exit 1; }
