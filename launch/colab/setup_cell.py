# Finds the machine's accelerator, installs flexolmo-jax for it, and stops where either fails. The
# commands below use the accelerator, which one process owns at a time: this process runs no JAX.
import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # `make notebooks` writes the address in pyproject.toml here

if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
    accelerator = "tpu"
elif glob.glob("/dev/nvidia[0-9]*"):
    accelerator = "cuda"
else:
    accelerator = ""

if "google.colab" in sys.modules:  # what lies in Drive stays when Colab takes the machine back
    from google.colab import drive

    drive.mount("/content/drive")
    os.makedirs("/content/drive/MyDrive/flexolmo", exist_ok=True)
    os.chdir("/content/drive/MyDrive/flexolmo")
print("working in", os.getcwd())

if importlib.util.find_spec("flexolmo_jax") is None:
    if REPOSITORY:
        address = f"git+{REPOSITORY}"
    else:
        wheels = sorted(Path().glob("flexolmo_jax-*.whl"), key=os.path.getmtime)
        here = [*Path().glob("flexolmo-jax/"), *wheels]  # the newest wheel before a clone
        if not here:
            sys.exit(
                "flexolmo-jax has no public address yet: put a wheel (flexolmo_jax-*.whl) or a"
                f" clone (flexolmo-jax/) into {os.getcwd()} and run this cell again"
            )
        address = here[-1].resolve().as_uri()
        print("flexolmo-jax has no public address yet: installing", here[-1])
    wanted = f"flexolmo-jax[{accelerator}] @ {address}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    importlib.invalidate_caches()
    for name in ("jax", "numpy"):
        loaded = sys.modules.get(name)
        if loaded and loaded.__version__ != importlib.metadata.version(name):
            sys.exit(f"{name} was loaded before: Runtime > Restart session, then Runtime > Run all")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

ask = "import jax; print(jax.default_backend(), *jax.devices())"
asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
if asked.returncode or (accelerator and asked.stdout.startswith("cpu")):
    sys.exit(f"JAX cannot use this machine's accelerator ({accelerator or 'none'}): {asked.stderr}")
print("JAX runs on", asked.stdout)
