#!/usr/bin/env bash
# Make the Python environment, once: find an interpreter that OneFlow has a wheel for, make a virtual environment and
# install requirements.txt in it. Quick when all is there. Prints the path of the environment's python on stdout, the
# rest on stderr.
#
#   python=$(bash tools/setup_env.sh)
#
# Environment variables:
#   VENV             the virtual environment, default .venv (.venv-0.8.0 with ONEFLOW_VERSION=0.8.0)
#   PYTHON           the interpreter to make it with, tried first
#   ONEFLOW_VERSION  a version other than the one in requirements.txt: 0.8.0 is supported too
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }

# True for a CPython 3.8-3.10 on 64-bit Linux that really runs and can make virtual environments.
is_suitable() {
  "$1" -c '
import ensurepip, platform, ssl, sys, venv
suitable = platform.python_implementation() == "CPython" and (3, 8) <= sys.version_info[:2] <= (3, 10)
sys.exit(not (suitable and sys.platform == "linux" and platform.machine() == "x86_64"))
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
}

find_python() {
  local candidate
  while read -r candidate; do
    if [[ -n $candidate ]] && command -v "$candidate" >/dev/null && is_suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done < <(list_candidates)
  if command -v uv >/dev/null && uv python install 3.10 >&2 && candidate=$(uv python find 3.10) &&
    is_suitable "$candidate"; then
    echo "$candidate"
    return
  fi
  die "no CPython 3.8, 3.9 or 3.10 (x86-64 Linux, with venv and ssl) was found, OneFlow has wheels for no other;" \
    "install one ('uv python install 3.10', 'pyenv install 3.10', 'conda create -n py310 python=3.10' or" \
    "'apt-get install python3.10 python3.10-venv') or set PYTHON to its path"
}

requirements() {
  sed -E "s/^oneflow==.*/oneflow==${ONEFLOW_VERSION:-$pinned}/" "$root/requirements.txt"
}

# Identifies what is to be installed and for which interpreter; kept in the environment once all of it is there.
stamp() {
  { requirements; "$VENV/bin/python" -c 'import sys; print(sys.version, sys.base_prefix)'; } </dev/null | sha256sum
}

is_complete() {
  [[ -f $VENV/setup.stamp ]] && [[ $(stamp 2>/dev/null) == "$(<"$VENV/setup.stamp")" ]]
}

make_venv() {
  local python options=()
  if [[ -e $VENV && -n $(ls -A "$VENV") ]]; then
    [[ -f $VENV/pyvenv.cfg ]] ||
      die "VENV=$VENV exists and is not a virtual environment; remove it or set VENV to another path"
    if "$VENV/bin/python" -m pip --version </dev/null >/dev/null 2>&1; then
      is_suitable "$VENV/bin/python" ||
        die "VENV=$VENV has $("$VENV/bin/python" -V), OneFlow needs CPython 3.8 to 3.10;" \
          "remove it or set VENV to another path"
      return
    fi
    options=(--clear) # interrupted while it was made, or its interpreter is gone
  fi
  python=$(find_python)
  say "making $VENV with $python ($("$python" -V))"
  "$python" -m venv ${options[@]+"${options[@]}"} "$VENV" >&2 || die "cannot make the virtual environment $VENV"
}

install() {
  local message
  rm -f "$VENV/setup.stamp"
  make_venv
  requirements >"$VENV/requirements.txt"
  say "installing requirements.txt in $VENV (OneFlow $(sed -n 's/^oneflow==//p' "$VENV/requirements.txt")):" \
    "about 2 GB to download the first time"
  PIP_USER=0 "$VENV/bin/python" -m pip install --disable-pip-version-check -r "$VENV/requirements.txt" </dev/null >&2 ||
    die "pip could not install requirements.txt in $VENV (see above); run the same command again to continue"
  message=$("$VENV/bin/python" -c 'import oneflow' </dev/null 2>&1) ||
    die "oneflow is installed in $VENV but cannot be imported: $(tail -n 1 <<<"$message")"
  stamp >"$VENV/setup.stamp.part"
  mv "$VENV/setup.stamp.part" "$VENV/setup.stamp"
}

# another active environment must not leak in
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
pinned=$(sed -n 's/^oneflow==//p' "$root/requirements.txt")
[[ ${ONEFLOW_VERSION:-$pinned} =~ ^[0-9][0-9A-Za-z.+]*$ ]] ||
  die "ONEFLOW_VERSION=$ONEFLOW_VERSION is not a version; expected one like $pinned"
if [[ -z ${VENV:-} ]]; then
  VENV=$root/.venv
  [[ ${ONEFLOW_VERSION:-$pinned} == "$pinned" ]] || VENV+=-$ONEFLOW_VERSION
fi
[[ $VENV == /* ]] || VENV=$PWD/$VENV

if ! is_complete; then
  if command -v flock >/dev/null; then
    exec 9<"$root/tools" # two set-ups at a time would disturb each other
    flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
  fi
  is_complete || install
fi
echo "$VENV/bin/python"
