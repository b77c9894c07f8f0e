#!/bin/sh
# Build ffcv into .venv: `make setup ffcv=1`. Its sources want TurboJPEG's and OpenCV's headers, as pkg-config knows them.
#
# Of OpenCV two modules are enough (14 packages of Debian's, where libopencv-dev is 212): where they are there without
# OpenCV's own opencv4.pc, one is written, and an opencv2/opencv.hpp that includes the two.
set -eu
python=$1  # of the venv
if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then uv=uv; else uv=$(dirname "$python")/uv; fi
shim=$(dirname "$(dirname "$python")")/opencv-of-two-modules

lacking() {
    echo "error: ffcv=1: $1; run sudo apt-get install -y --no-install-recommends g++ python3-dev pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev" >&2
    exit 2
}

command -v pkg-config >/dev/null 2>&1 || lacking 'no pkg-config here, with which ffcv finds headers'
command -v "${CXX:-c++}" >/dev/null 2>&1 || lacking "no ${CXX:-c++} here, with which ffcv is built"
pkg-config --exists libturbojpeg || lacking "no headers of TurboJPEG here"
if ! pkg-config --exists opencv4; then
    include=${OPENCV_INCLUDE:-/usr/include/opencv4}
    for module in core imgproc; do
        [ -e "$include/opencv2/$module.hpp" ] || lacking "no headers of OpenCV's $module here"
    done
    mkdir -p "$shim/opencv2"
    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/opencv2/opencv.hpp"
    printf 'Name: opencv4\nDescription: two modules of it\nVersion: 4\nLibs: -L/usr/lib -lopencv_imgproc -lopencv_core\nCflags: -I%s -I%s\n' \
        "$(cd "$shim" && pwd)" "$include" >"$shim/opencv4.pc"
    PKG_CONFIG_PATH=$(cd "$shim" && pwd)${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
    export PKG_CONFIG_PATH
fi

# --no-deps: what ffcv asks for is in the lock, with OpenCV's wheel that needs no screen in place of the one that does
words="--quiet --no-deps --no-build-isolation --require-hashes -r requirements-ffcv.lock"
if command -v "$uv" >/dev/null 2>&1; then
    "$uv" pip install --python "$python" $words
else
    "$python" -m pip install --disable-pip-version-check $words
fi
"$python" -c 'import ffcv' || { echo 'error: ffcv=1: it is built, and does not load (see above)' >&2; exit 2; }
echo 'ffcv is here: loader=ffcv reads what make data writes'
