"""flipproof as a model of lm-eval, on lm-eval's own command line. Needs the extra ``flipproof[eval]``.

lm-eval 0.4.13 finds only models that are imported, so this is its command line with the model ``flipproof`` added:

    python -m flipproof.harness --model flipproof --tasks arc_easy \\
        --model_args pretrained=DIR,w_p_exp=1e-5,w_zero_out_t=256,seed=3

There ticks go on through all tasks of a run. lm-eval's own cache of responses is refused: it knows neither weights nor
faults, so that a faulty model would be given a clean one's answers, and what it does answer moves the other requests to
other ticks and batches, that is, to other flips.
"""

import re
import sys
from pathlib import Path
from typing import Any

from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.faults.inject import inject
from flipproof.faults.spec import BitFlipSpec, field_names
from flipproof.files import is_path
from flipproof.log import logger, set_up_logging
from flipproof.models.adapter import adapter_spec, load_adapter
from flipproof.models.hub import expand
from flipproof.models.load import byte_tokenizer

try:
    from flipproof.measure.tasks import HFLM, one_process, overflow_is_infinity
except ConfigError as error:
    sys.exit(f"flipproof.harness: error: {error}") if __name__ == "__main__" else None
    raise
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import get_dtype


@register_model("flipproof")
class FlipproofLM(HFLM):
    """lm-eval's Hugging Face model with faulty layers.

    Args:
        pretrained: directory or Hub name.
        config: a TOML or YAML file, or a preset's name, whose [bitflip] counts.
        seed: the fault seed, from tick 0; the same as ``base_seed``.
        adapter: directory of a PEFT adapter, merged under faults as in training.
        tokenizer: a Hub name or a directory, or "bytes".
        **more: the keys of [bitflip]; and whatever ``hf`` takes, a batch size of "auto" excepted.

    Raises:
        ConfigError: for keys or values that do not belong to [bitflip], several processes, or lm-eval's own cache.
    """

    def __init__(
        self,
        pretrained: str,
        config: str | None = None,
        seed: int | None = None,
        adapter: str | None = None,
        tokenizer: Any = None,
        batch_size: int | str | None = 1,
        **more: Any,
    ) -> None:
        one_process("--model flipproof")
        if str(batch_size).startswith("auto"):
            raise ConfigError([f"batch_size = {batch_size!r}: a number is allowed; which bits flip depends on it"])
        if is_path(pretrained) and not Path(expand(pretrained)).exists():
            raise ConfigError([f"pretrained = {pretrained!r}: no local directory has this path"])
        keys = [key for key in more if key in field_names(BitFlipSpec) or re.match(r"(w|x|kv)_", key)]
        bitflip = {key: more.pop(key) for key in keys} | ({} if seed is None else {"base_seed": seed})
        self._faults = load_config(
            [config] if config else [], {"bitflip": bitflip, "model": {"hf_model_path": pretrained}}
        )
        self._adapter = Path(adapter) if adapter else None
        computed = more.get("mixed_precision_dtype")
        self._computed = None if computed is None else get_dtype(computed)
        tokenizer = byte_tokenizer() if tokenizer == "bytes" else tokenizer
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=batch_size, **more)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        spec, adapter = self._faults.bitflip, self._adapter
        lora = adapter_spec(adapter) if adapter else None
        if adapter or spec.any_fault:
            logger.info("%s", inject(self._model, spec, lora, computed=self._computed))
        if adapter:
            load_adapter(self._model, adapter)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """lm-eval's, but that a tokenizer without one is refused."""
        if chat_template and not self.tokenizer.chat_template:
            raise ConfigError(["--apply_chat_template: the tokenizer has no chat template; leave the flag out"])
        template: str | None = super().chat_template(chat_template)
        return template

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refused: lm-eval's cache would answer for a faulty model what another one said."""
        raise ConfigError(["--use_cache: its answers know neither weights nor faults; leave it out"])


def main() -> int:
    """lm-eval's command line; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    set_up_logging()
    try:
        with overflow_is_infinity():
            cli_evaluate()
    except ConfigError as error:
        for problem in error.problems:
            print(f"flipproof.harness: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
