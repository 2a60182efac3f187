"""Package metadata comes from settings.ini, the one place that nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
extras["all"] = sorted({r for rs in extras.values() for r in rs})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"],
    url=cfg["git_url"], license="Apache-2.0", keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Operating System :: POSIX :: Linux",
                 *(f"Programming Language :: Python :: {v}" for v in cfg["pythons"].split()),
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["uat_repro", "uat_repro.*"]),
    package_data={"uat_repro": ["py.typed", "__init__.pyi", "claims.yaml", "page.html", "workflow/Snakefile", "workflow/catalogue.yaml",
                                "workflow/profiles/*.yaml", "workflow/clusters/*/config.yaml",
                                "workflow/accelerate/*.yaml"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
