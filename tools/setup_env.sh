#!/usr/bin/env bash
# Make the Python environment, once: find an interpreter that OneFlow has a wheel for (or fetch one with uv), make a
# virtual environment and install requirements.txt in it. Quick when all is there; after an interruption the same
# command continues. Prints the path of the environment's python on stdout, the rest on stderr; what pip and uv say
# goes to a log beside the environment, VENV-setup.log.
#
#   python=$(bash tools/setup_env.sh)      what training and the converters need
#   bash tools/setup_env.sh spark tests    and more, by name:
#     spark    PySpark, for criteo_parquet.py --engine spark (needs Java too)
#     onnx     onnx and onnxruntime, for models in ONNX format
#     tests    pytest and ruff
#
# Environment variables:
#   VENV             the virtual environment, default .venv (.venv-0.8.0 with ONEFLOW_VERSION=0.8.0)
#   PYTHON           the interpreter to make it with, tried first
#   ONEFLOW_VERSION  a version other than the one in requirements.txt: 0.8.0 is supported too
# pip and uv read theirs too: PIP_INDEX_URL, UV_PYTHON_INSTALL_MIRROR and others.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }

# --------------------------------------------------------------------------------------------------------------- stages

# Runs a command with its output in the log, and says in one line what it is and how long it took.
stage() { # what, command...
  local what=$1 start=$SECONDS status=0
  shift
  log_size=$(wc -c <"$log")
  printf '%s ...' "$what" >&2
  if [[ -t 2 ]]; then
    while sleep 1; do printf '\0337 %d s\0338' $((SECONDS - start)); done >&2 & # from where the cursor is, and back
    ticker=$!
  fi
  { "$@" </dev/null >>"$log" 2>&1; } 2>/dev/null || status=$? # without what bash says when a signal ends it
  ((status <= 128)) || echo "ended by $(kill -l "$status")" >>"$log"
  stop_ticker
  ((status == 0)) || printf ' failed after' >&2
  say " $((SECONDS - start)) s"
  return "$status"
}

stop_ticker() {
  [[ -z $ticker ]] || { kill "$ticker" && wait "$ticker" || true; } 2>/dev/null
  ticker=""
}

# Why the last stage failed: pip's first error, or the last line.
reason() {
  local lines
  lines=$(tail -c "+$((log_size + 1))" "$log" | sed -E '/^\s*$/d; s/^\s*(cause: )?//')
  grep -m 1 '^ERROR: ' <<<"$lines" || tail -n 1 <<<"$lines"
}

interrupted() { # signal's number
  exec 2>&8 # a stage may be running
  stop_ticker
  say
  say "error: interrupted; run the same command again to continue"
  exit $((128 + $1))
}

# --------------------------------------------------------------------------------------------------------- interpreters

# True for a CPython 3.8-3.10 that really runs and can make virtual environments.
is_suitable() {
  "$1" -c '
import ensurepip, platform, ssl, sys, venv
sys.exit(not (platform.python_implementation() == "CPython" and (3, 8) <= sys.version_info[:2] <= (3, 10)))
' </dev/null >/dev/null 2>&1
}

# Where interpreters may be, one a line, best first. An entry on PATH may be a shim that fails, so nothing here is trusted.
list_candidates() {
  local version
  echo "${PYTHON:-}"
  for version in 3.10 3.9 3.8; do
    type -ap "python$version" || true
    printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python
    printf '%s\n' {/usr,/usr/local}/bin/python"$version" /opt/python/cp"${version/./}"-*/bin/python
  done
  type -ap python3 python || true
  printf '%s\n' "${CONDA_PREFIX:-}/bin/python" \
    "${HOME:-}"/{miniconda3,anaconda3,miniforge3,mambaforge,.conda}/{,envs/*/}bin/python
  if command -v conda >/dev/null; then
    conda env list 2>/dev/null | awk '/^[^#]/ {print $NF "/bin/python"}' || true
  fi
  if command -v uv >/dev/null; then
    for version in 3.10 3.9 3.8; do uv python find "$version" 2>/dev/null || true; done
  fi
  printf '%s\n' "$VENV-python"/cpython-3.10*/bin/python3.10 # where fetch_python puts it
}

find_python() {
  local candidate
  while read -r candidate; do
    if [[ -n $candidate ]] && command -v "$candidate" >/dev/null && is_suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done < <(list_candidates)
  return 1
}

# Fetches CPython 3.10 with uv, which a temporary environment lends where there is none.
fetch_python() {
  local uv other="make one with 'conda create -n py310 python=3.10' or 'pyenv install 3.10', or set PYTHON to its path"
  say "No CPython 3.8, 3.9 or 3.10 on PATH, in pyenv, conda or uv, and OneFlow has wheels for no other"
  if ! uv=$(type -P uv); then
    stage "Fetching uv, 18 MB to download" fetch_uv ||
      die "uv, which fetches CPython 3.10, could not be installed from PyPI ($(reason)), see $log; $other"
    uv=$scratch/uv/bin/uv
  fi
  stage "Fetching CPython 3.10 with uv into $VENV-python" \
    env UV_PYTHON_INSTALL_DIR="$VENV-python" UV_PYTHON_INSTALL_BIN=0 "$uv" python install 3.10 ||
    die "uv could not fetch CPython 3.10 ($(reason)), see $log; run the same command again," \
      "with UV_PYTHON_INSTALL_MIRROR where GitHub cannot be reached, or $other"
}

# Puts uv into $scratch/uv/bin. Some Pythons have pip but cannot make an environment, some the other way round.
fetch_uv() {
  local python pythons
  mapfile -t pythons < <(type -ap python3 python)
  for python in ${pythons[@]+"${pythons[@]}"}; do
    "$python" -m venv "$scratch/uv" && "$scratch/uv/bin/python" -m pip install "${pip_options[@]}" uv && return
    rm -rf "$scratch/uv"
    "$python" -m pip install "${pip_options[@]}" --target "$scratch/uv" uv && return
  done
  ((${#pythons[@]})) || echo "ERROR: there is no python3 on PATH"
  return 1
}

make_venv() {
  local python options=()
  if [[ -f $VENV/pyvenv.cfg ]]; then
    if "$VENV/bin/python" -m pip --version </dev/null >/dev/null 2>&1; then
      is_suitable "$VENV/bin/python" ||
        die "VENV=$VENV has $("$VENV/bin/python" -V), OneFlow needs CPython 3.8 to 3.10;" \
          "remove it or set VENV to another path"
      return
    fi
    options=(--clear) # interrupted while it was made, or its interpreter is gone
  fi
  if ! python=$(find_python); then
    fetch_python
    python=$(find_python) || die "the CPython 3.10 that uv fetched into $VENV-python does not run"
  fi
  [[ -z ${PYTHON:-} || $python == "$PYTHON" ]] || say "PYTHON=$PYTHON is no CPython 3.8 to 3.10 that can make environments"
  stage "Making it with $("$python" -V), $python" "$python" -m venv ${options[@]+"${options[@]}"} "$VENV" ||
    die "cannot make the virtual environment $VENV ($(reason)), see $log"
}

# ------------------------------------------------------------------------------------------------------------- packages

# What is to be installed here for a group of packages, one requirement a line.
requirements() { # training, spark, onnx or tests
  local left_out='^-r ' # PySpark, see requirements.txt
  case $1 in
    training)
      [[ $oneflow != 0.8.* ]] || left_out+='|^nvidia-'
      sed -E "/$left_out/d; s/^oneflow==.*/oneflow==$oneflow/" "$root/requirements.txt" ;;
    spark | onnx) cat "$root/tools/requirements_$1.txt" ;;
    tests) cat "$root/tests/requirements.txt" ;;
  esac
}

# Identifies what is to be installed and for which interpreter; kept in the environment once all of it is there.
stamp() { # group
  { requirements "$1"; "$VENV/bin/python" -c 'import sys; print(sys.version, sys.base_prefix)'; } </dev/null | sha256sum
}

is_complete() { # group
  [[ -f $VENV/setup-$1.stamp ]] && [[ $(stamp "$1" 2>/dev/null) == "$(<"$VENV/setup-$1.stamp")" ]]
}

list_missing() { # groups
  local group
  for group in "$@"; do is_complete "$group" || echo "$group"; done
}

# Forgets packages that pip was unpacking when it was killed, since it would take them for installed: it writes
# INSTALLER when all files are there.
forget_unfinished() {
  local info
  for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
    [[ -e $info/INSTALLER ]] || rm -rf "$info"
  done
}

pip_install() { "$VENV/bin/python" -m pip install "${pip_options[@]}" "$@"; }

# All of training but OneFlow. petastorm comes without what it declares: that is in the list too, except PySpark.
install_rest() {
  pip_install -r <(grep -v '^petastorm' "$list") && pip_install --no-deps "$(grep '^petastorm' "$list")"
}

install() { # what, command...
  stage "$@" || die "pip could not install that ($(reason)), see $log; run the same command again to continue"
}

install_group() { # group
  local what more=$VENV/requirements-$1.txt
  case $1 in
    training)
      requirements training >"$list"
      mapfile -t what < <(grep -E '^(oneflow|nvidia-)' "$list")
      install "OneFlow $oneflow $size_oneflow" pip_install -c "$list" "${what[@]}"
      install "NumPy, pyarrow, petastorm and others, 0.2 GB" install_rest
      stage "Trying it: import oneflow" "$VENV/bin/python" -c 'import oneflow' ||
        die "oneflow is installed in $VENV but cannot be imported ($(reason)), see $log"
      return ;;
    spark) what="PySpark, 317 MB" ;;
    onnx) what="onnx and onnxruntime, 36 MB" ;;
    tests) what="pytest, ruff and an S3 server, 43 MB" ;;
  esac
  requirements "$1" >"$more"
  install "$what" pip_install -c "$list" -r "$more"
}

# ----------------------------------------------------------------------------------------------------------------- main

# Ends where the disk has no room for what training needs and an interrupted set-up has not left there already.
check_space() {
  local free had=0 needed folder
  folder=$(dirname "$VENV")
  [[ ! -d $VENV ]] || folder=$VENV had=$(du -sk "$VENV" | cut -f 1) || true
  free=$(df -Pk "$folder" 2>/dev/null | sed -nE 's/.* ([0-9]+) +[0-9]+% .*/\1/p') || true
  needed=$((${size_disk/./} * (1 << 20) / 10 - had))
  [[ -z $free ]] || ((free >= needed)) ||
    die "$folder has $(gigabytes "$free") free, the environment needs $(gigabytes "$needed");" \
      "free some, or set VENV to a folder on another disk"
}

gigabytes() { # KiB
  local tenths=$((10 * $1 + (1 << 19) >> 20)) # as df -h and du -h count
  echo "$((tenths / 10)).$((tenths % 10)) GB"
}

set_up() { # groups
  local group
  [[ $(uname -sm) == "Linux x86_64" ]] || die "OneFlow has wheels for x86-64 Linux only; this is $(uname -sm)"
  [[ -f $VENV/pyvenv.cfg || ! -e $VENV || -z $(ls -A "$VENV") ]] ||
    die "VENV=$VENV exists and is not a virtual environment; remove it or set VENV to another path"
  mkdir -p "$(dirname "$VENV")" || die "cannot write $log; set VENV to a path where you may"
  [[ $1 != training ]] || check_space
  : >"$log" || die "cannot write $log; set VENV to a path where you may"
  if [[ $1 == training ]]; then
    say "Setting up $VENV: up to $size_download GB to download and $size_disk GB on disk; the log is $log"
  else
    say "Adding to $VENV; the log is $log"
  fi
  make_venv
  forget_unfinished
  for group in "$@"; do
    rm -f "$VENV/setup-$group.stamp"
    install_group "$group"
    stamp "$group" >"$VENV/setup.part"
    mv "$VENV/setup.part" "$VENV/setup-$group.stamp"
  done
  say "Ready after $SECONDS s, $(du -sh "$VENV" | cut -f 1) on disk"
}

case " $* " in *" --help "* | *" -h "*)
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit ;;
esac
for group in "$@"; do
  [[ $group =~ ^(spark|onnx|tests)$ ]] ||
    { say "error: '$group' is no group of packages; expected spark, onnx or tests (see --help)"; exit 2; }
done
set -- training "$@"

# another active environment must not leak in
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
pip_options=(--disable-pip-version-check --no-input --progress-bar off)
pinned=$(sed -n 's/^oneflow==//p' "$root/requirements.txt")
oneflow=${ONEFLOW_VERSION:-$pinned}
[[ $oneflow =~ ^[0-9][0-9A-Za-z.+]*$ ]] ||
  die "ONEFLOW_VERSION=$oneflow is not a version; expected one like $pinned"
# measured on CPython 3.10, downloads as pip tells them
size_oneflow="and the CUDA libraries that it needs, 2.1 GB"
size_download=2.3 size_disk=4.8 # GB
if [[ $oneflow == 0.8.* ]]; then
  size_oneflow="with its CUDA libraries, 0.8 GB"
  size_download=1.0 size_disk=2.6
fi
if [[ -z ${VENV:-} ]]; then
  VENV=$root/.venv
  [[ $oneflow == "$pinned" ]] || VENV+=-$oneflow
fi
VENV=${VENV%/}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
log=$VENV-setup.log list=$VENV/requirements.txt ticker="" log_size=0

mapfile -t missing < <(list_missing "$@")
if ((${#missing[@]})); then
  scratch=$(mktemp -d)
  trap 'stop_ticker; rm -rf "$scratch"' EXIT
  exec 8>&2
  trap 'interrupted 2' INT
  trap 'interrupted 15' TERM
  if command -v flock >/dev/null; then
    exec 9<"$root/tools" # two set-ups at a time would disturb each other
    flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
    mapfile -t missing < <(list_missing "$@")
  fi
  ((${#missing[@]} == 0)) || set_up "${missing[@]}"
fi
echo "$VENV/bin/python"
