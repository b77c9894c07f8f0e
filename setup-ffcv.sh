#!/bin/sh
# Build ffcv into .venv: `make setup ffcv=1`. Its build needs TurboJPEG's and OpenCV's headers, found by pkg-config.
#
# Two modules of OpenCV are enough (14 Debian packages; libopencv-dev needs 212). Where they are installed without
# OpenCV's own opencv4.pc, one is written, with an opencv2/opencv.hpp that includes the two.
set -eu
python=$1  # of the venv
if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then uv=uv; else uv=$(dirname "$python")/uv; fi
shim=$(dirname "$(dirname "$python")")/opencv-of-two-modules

lacking() {
    echo "error: ffcv=1: $1; run sudo apt-get install -y --no-install-recommends g++ python3-dev pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev" >&2
    exit 2
}

command -v pkg-config >/dev/null 2>&1 || lacking 'pkg-config is not installed, which finds the headers for ffcv'
command -v "${CXX:-c++}" >/dev/null 2>&1 || lacking "${CXX:-c++} is not installed, which compiles ffcv"
pkg-config --exists libturbojpeg || lacking "the headers of TurboJPEG are not installed"
if ! pkg-config --exists opencv4; then
    include=${OPENCV_INCLUDE:-/usr/include/opencv4}
    for module in core imgproc; do
        [ -e "$include/opencv2/$module.hpp" ] || lacking "the headers of OpenCV's $module are not installed"
    done
    mkdir -p "$shim/opencv2"
    printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/opencv2/opencv.hpp"
    printf 'Name: opencv4\nDescription: two modules of OpenCV\nVersion: 4\nLibs: -L/usr/lib -lopencv_imgproc -lopencv_core\nCflags: -I%s -I%s\n' \
        "$(cd "$shim" && pwd)" "$include" >"$shim/opencv4.pc"
    PKG_CONFIG_PATH=$(cd "$shim" && pwd)${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
    export PKG_CONFIG_PATH
fi

# --no-deps: ffcv's requirements are in the lock, with OpenCV's headless wheel in place of the one with a GUI
words="--quiet --no-deps --no-build-isolation --require-hashes -r requirements-ffcv.lock"
if command -v "$uv" >/dev/null 2>&1; then
    "$uv" pip install --python "$python" $words
else
    "$python" -m pip install --disable-pip-version-check $words
fi
"$python" -c 'import ffcv' || { echo 'error: ffcv=1: ffcv was built but cannot be imported (see above)' >&2; exit 2; }
echo 'ffcv is installed: loader=ffcv reads what make data writes'
