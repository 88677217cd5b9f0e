"""Which key was meant, where none has the name that was given."""

import difflib
from collections.abc import Iterable

from flipproof.config.schema import SECTIONS
from flipproof.faults.spec import field_names

KEYS = {f"{section}.{key}": key for section, cls in SECTIONS.items() for key in field_names(cls)}

# Words of other trainers for keys here, where spelling does not lead from one to the other.
_OTHER_WORDS = {
    ("training.lr",): ("learning_rate",),
    ("training.dtype",): ("precision", "torch_dtype"),
    ("training.steps",): ("max_steps", "max_train_steps", "num_steps", "epochs", "num_train_epochs"),
    ("training.seq_len",): ("block_size", "max_length", "max_seq_length", "max_seq_len", "context_length"),
    ("training.local_batch_size",): ("batch_size", "micro_batch_size", "per_device_train_batch_size"),
    ("training.log_freq",): ("log_train_loss_steps", "logging_steps"),
    ("training.tokens_per_parameter",): ("token_num_scale",),
    ("training.seed", "bitflip.base_seed"): ("seed", "random_seed"),
    ("model.hf_model_path",): ("model", "model_path", "model_name", "model_name_or_path", "checkpoint_dir"),
    ("data.source",): ("data", "dataset", "dataset_name", "json_path"),
    ("logging.run_dir",): ("output", "output_dir", "out_dir", "save_dir", "save_path"),
    ("logging.wandb",): ("report_to", "with_tracking", "enable_wandb"),
    ("parallelism.fsdp_degree",): ("data_parallel_shard_degree",),
    ("parallelism.replicas",): ("data_parallel_replicate_degree",),
}
_MEANT = {word: keys for keys, words in _OTHER_WORDS.items() for word in words}


def keys_meant(word: str) -> list[str]:
    """The keys, as section.key, that a word without its section stands for; the nearest one where none is called so."""
    word = word.replace("-", "_").lower()
    if exact := [key for key, name in KEYS.items() if word in (name, key.replace(".", "_"))]:
        return [*exact, *(key for key in _MEANT.get(word, ()) if key not in exact)]
    if word in _MEANT:
        return list(_MEANT[word])
    near = nearest(word, KEYS.values())
    return [key for key, name in KEYS.items() if name == near][:1]


def is_named(word: str) -> bool:
    """Whether a key is called so, here or in other trainers."""
    spelled = word.replace("-", "_").lower()
    return spelled in KEYS.values() or spelled in _MEANT


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelled most like it, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def near_key(key: str, section: str) -> str:
    """The end of a message about an unknown key of a section."""
    known = field_names(SECTIONS[section])
    spelled = key.replace("-", "_").lower()
    elsewhere = [meant for meant in KEYS if KEYS[meant] == spelled] or list(_MEANT.get(spelled, ()))
    near = nearest(spelled, known)
    meant = elsewhere or ([f"{section}.{near}"] if near else keys_meant(spelled))
    if not meant:
        return f"; known are {', '.join(known)}"
    names = sorted((name for name in meant), key=lambda name: not name.startswith(f"{section}."))
    return f"; did you mean {names[0].removeprefix(f'{section}.')}?"


def near_table(name: str, is_table: bool) -> str:
    """The end of a message about what is at the top of a file and is no table of a config."""
    if not is_table and (meant := keys_meant(name)):
        return f" outside a table; did you mean {' or '.join(meant)}?"
    near = nearest(name, SECTIONS)
    return f"; did you mean {near}?" if near else f"; known are {', '.join(SECTIONS)}"
