#!/usr/bin/env bash
# Make the environment if needed (see tools/setup_env.sh for its variables) and run the tests; arguments go to pytest.
#
#   bash tests/run.sh -k launcher
#   ONEFLOW_VERSION=0.8.0 bash tests/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash tools/setup_env.sh tests spark onnx)
exec "$python" -m pytest -o testpaths=tests "$@" </dev/null
