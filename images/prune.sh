#!/bin/sh
# Takes out of a virtual environment what no step uses: `sh images/prune.sh /opt/venv`.
set -eu
packages=$(echo "$1"/lib/python3.*/site-packages)
cd "$packages"
# Test suites of the large packages. `testing` folders are no tests: libraries import them.
for package in fontTools matplotlib mpmath networkx numpy pandas pyarrow scipy sklearn sympy; do
    if [ -d "$package" ]; then find "$package" -name tests -type d -prune -exec rm -rf {} +; fi
done
# C++ headers and test programs; the manager of shared memory is what torch starts at run time.
rm -rf torch/test torch/include torch/share/cmake pyarrow/include
if [ -d torch/bin ]; then find torch/bin -type f ! -name torch_shm_manager -delete; fi
# MLflow's pages in a browser, when no server is run; solvers for other systems.
if [ "${2:-}" != --keep-pages ]; then rm -rf mlflow/server/js; fi
rm -rf pulp/solverdir/cbc/osx pulp/solverdir/cbc/win
find . -name '*.a' -delete
find . -name __pycache__ -type d -prune -exec rm -rf {} +
