"All settings are in settings.ini; edit there, not here."
import shlex
from configparser import ConfigParser
import setuptools

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]
extras = {k[:-len("_requirements")]: shlex.split(v) for k, v in cfg.items() if k.endswith("_requirements")}

setuptools.setup(
    name=cfg["lib_name"],
    **{k: cfg[k] for k in "version description keywords author author_email".split()},
    license="Apache-2.0",
    url=cfg["git_url"],
    classifiers=[
        "Development Status :: " + statuses[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"].title(),
        "Programming Language :: Python :: " + cfg["min_python"],
    ],
    packages=setuptools.find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    install_requires=shlex.split(cfg.get("requirements", "")),
    extras_require=extras,
    python_requires=">=" + cfg["min_python"],
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    zip_safe=False,
    entry_points={
        "console_scripts": shlex.split(cfg.get("console_scripts", "")),
        "vllm.general_plugins": ["video_vlm=video_vlm.serving:register"],
        "nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],
    },
)
