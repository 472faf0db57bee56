#!/usr/bin/env bash
# Make the environment if needed (see tools/setup_env.sh for its variables) and run the tests: all of them, in three
# processes that wait for a quarter of their time, or with arguments what pytest makes of these.
#
#   bash tests/run.sh -k launcher
#   ONEFLOW_VERSION=0.8.0 bash tests/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash tools/setup_env.sh tests spark onnx)
(($#)) || set -- -n 3 --dist loadgroup
unset PYTHONDONTWRITEBYTECODE  # a tenth of the programs' start too, of which there are more than 100
# petastorm imports distutils, and with setuptools' own all of setuptools: a tenth of the trainer's start
export SETUPTOOLS_USE_DISTUTILS=stdlib
exec "$python" -m pytest -o testpaths=tests "$@" </dev/null
