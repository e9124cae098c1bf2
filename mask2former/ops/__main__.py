"""``python -m mask2former.ops`` says which kernels there are; with ``--build`` it builds them in place."""

import argparse
import os
import subprocess
import sys

import torch

from . import build, extension


def report() -> None:
    """Print what is in use and why other kernels are not."""
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for device in build.DEVICES:
        if device in extension.KERNELS:
            record = build.read_record(device)
            built_for = ", ".join(f"{key} {value}" for key, value in record["conditions"].items() if key != "sources")
            archs = f", architectures {record['architectures']}" if "architectures" in record else ""
            print(f"{device.upper()} kernels: in use, built for {built_for}{archs}")
        else:
            print(f"{device.upper()} kernels: none, {extension.reason(device)}")


def build_all() -> int:
    """Build in place; -> exit code."""
    failed = False
    try:
        for device in build.DEVICES:
            record = build.build(device, say=lambda line: print(line, flush=True))
            print(build.describe(device, record))
            for line in (*record.get("warnings", []), *str(record.get("reason", "")).splitlines()[1:]):
                print(line)
            failed |= not record.get("library") and (device == "cpu" or "failed" in record.get("reason", ""))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was there before is there still", file=sys.stderr)
        return 130
    if not failed:  # a process of its own, because this one may have loaded what was there before
        subprocess.run([sys.executable, "-m", "mask2former.ops"], check=False)
    return int(failed)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m mask2former.ops", description=__doc__)
    parser.add_argument("--build", action="store_true", help="build the kernels in place")
    parser.add_argument("--force-cuda", action="store_true", help="build CUDA kernels where no GPU is visible")
    arguments = parser.parse_args()
    if arguments.force_cuda:
        os.environ["FORCE_CUDA"] = "1"
    if arguments.build:
        return build_all()
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
