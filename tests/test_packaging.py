"""What pip builds of the checkout can be installed, and works in a folder without the checkout."""
import os, re, shutil, subprocess, sys, sysconfig, tarfile, venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = ["uat_repro", "setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
OFFLINE = ["--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]


def pip(*args, python=sys.executable):
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *map(str, args), *OFFLINE], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The command of an environment that holds the wheel; the wheel is built from the source archive."
    for package in ("setuptools", "pip"):
        if not find_spec(package): pytest.skip(f"building needs {package}: pip install {package}")
    tmp, ignore = tmp_path_factory.mktemp("dist"), shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT:
        copy = shutil.copy if (ROOT / name).is_file() else lambda a, b: shutil.copytree(a, b / a.name, ignore=ignore)
        copy(ROOT / name, tmp)
    archive = "from setuptools import build_meta; build_meta.build_sdist('sdist')"
    subprocess.run([sys.executable, "-c", archive], cwd=tmp, check=True, capture_output=True)
    pip("wheel", *(tmp / "sdist").iterdir(), "--no-build-isolation", "--wheel-dir", tmp / "wheel")
    venv.create(tmp / "env")
    pip("install", *(tmp / "wheel").iterdir(), python=tmp / "env/bin/python")
    site, = (tmp / "env/lib").glob("*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # what the library needs, after its own packages
    return tmp


def call(installed, *args):
    "The installed command, in a folder that has nothing of ours; `PYTHONPATH` would bring the checkout back."
    empty = installed / "elsewhere"
    empty.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "200"}
    return subprocess.run([installed / "env/bin" / args[0], *args[1:]], cwd=empty, env=env, capture_output=True, text=True)


def test_the_archive_holds_what_its_build_reads(installed):
    archive, = (installed / "sdist").iterdir()
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "uat_repro/claims.yaml", "uat_repro/page.html"} <= names


def test_the_installed_library_has_its_files(installed):
    code = ("from pathlib import Path; import uat_repro; from uat_repro.claims import read_claims; "
            "from uat_repro.models import load_model; from uat_repro.workflow import load_profile; "
            "load_model('tiny-llama'); load_profile('paper'); print(len(read_claims()), Path(uat_repro.__file__).parent)")
    said = call(installed, "python", "-c", code)
    claims, place = said.stdout.split()
    assert int(claims) >= 10 and Path(place).is_relative_to(installed / "env"), said.stderr


def test_snakemake_is_required_only_where_it_is_asked_for(installed):
    code = ("import sys; from importlib.metadata import requires; import uat_repro._tasks, uat_repro.evaluation, uat_repro.cli; "
            "print(*requires('uat_repro'), {'snakemake', 'papermill', 'ipykernel'} & {*sys.modules}, sep='\\n')")
    *required, imported = call(installed, "python", "-c", code).stdout.splitlines()
    grid = [line for line in required if re.match("snakemake>|papermill|ipykernel", line)]
    assert imported == "set()" and {'extra == "reproduce"'} <= {line.partition("; ")[2] for line in grid}
    assert all("extra == " in line for line in grid) and any(re.match("torch[^;]*$", line) for line in required)
    assert "ok  snakemake" in call(installed, "uat-repro", "doctor", "--timeout", ".1").stdout


def test_the_installed_command_tells_its_version_and_the_package_its_types(installed):
    said, (wheel,) = call(installed, "uat-repro", "--version"), (installed / "wheel").iterdir()
    assert (said.returncode, said.stdout) == (0, f"uat-repro {wheel.name.split('-')[1]}\n")
    assert next((installed / "env/lib").glob("*/site-packages/uat_repro/py.typed")).is_file()


def test_without_a_checkout_the_commands_say_what_to_clone(installed):
    told = call(installed, "uat-repro", "reproduce", "--dry-run")
    assert told.returncode == 1 and "clone the repository" in told.stderr and told.stderr.count("\n") == 1
    reason = told.stderr.removeprefix("uat-repro: ").strip()
    doctor = call(installed, "uat-repro", "doctor", "--timeout", ".1")
    assert doctor.returncode == 1 and reason in doctor.stdout and "profile cpu      lacks notebooks" in doctor.stdout
