"""Python imports this first where its folder is in PYTHONPATH: see ../arm.py."""

import os

if "LMCORE_FAULT" in os.environ:
    from benchmarks.faults.arm import arm_by_environment

    arm_by_environment()
