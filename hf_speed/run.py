"""Runs an unmodified script with hf_speed switched on.

    HF_SPEED_CONFIG=zero3.yaml accelerate launch -m hf_speed.run train.py --its --own arguments

The stock classes of transformers learn the `hf_speed` field (`hf_speed.enable()`), which takes its
value from HF_SPEED_CONFIG, and the script then runs as `__main__`.
"""

import runpy
import sys
from pathlib import Path

from hf_speed.config import env, load_config
from hf_speed.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Run `arguments[0]` as `__main__` with the rest as its `sys.argv`.

    Raises:
        ConfigError: no script is given or it does not exist; HF_SPEED_CONFIG is unset or wrong; the
            world is not the one that `hf-speed launch` promised.
    """
    from hf_speed import disable, enable

    if not arguments:
        raise ConfigError("No script given. Use: accelerate launch -m hf_speed.run train.py ...")
    script = Path(arguments[0])
    if not script.is_file():
        raise ConfigError(f"There is no script at {str(script.absolute())!r}.")
    config = env.config_text()
    if config is None:
        raise ConfigError(
            f"{env.CONFIG_VARIABLE} is unset, so that hf_speed.run would change nothing. Set it to "
            "a config file, or use `hf-speed launch --config FILE -n N`."
        )
    load_config(config)
    env.check_promised_world()
    before = sys.argv[:], sys.path[:]
    enable()
    try:
        sys.argv = arguments
        # As `python script.py` would: the script imports its neighbours.
        sys.path.insert(0, str(script.parent.absolute()))
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = before
        disable()


if __name__ == "__main__":
    main(sys.argv[1:])
