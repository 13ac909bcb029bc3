"""A byte-level BPE tokenizer trained on the instructions of a task suite."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"
MIN_VOCAB_SIZE = 4 + 256  # special tokens and bytes
_STATE_BINS = range(-1, 256)  # π0.5 writes the state as bin numbers; -1 is below the range


def prompt_texts(kind: str, instructions: Sequence[str]) -> list[str]:
    """The prompts that LeRobot's processors make of instructions, without π0.5's state numbers.

    Args:
        kind: "pi0" or "pi05".
        instructions: Task instructions.
    """
    if kind == "pi0":
        return [f"{text}\n" for text in instructions]
    return [f"Task: {text.strip().replace('_', ' ')}, State:;\nAction: " for text in instructions]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer that knows every byte, so that no text is ever unknown.

    Args:
        texts: Training texts.
        vocab_size: Upper limit of the vocabulary, at least 260.

    Returns:
        A tokenizer that prepends <bos>; pad id 0.

    Raises:
        ValueError: If `vocab_size` is below 260.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and 4 special tokens need {MIN_VOCAB_SIZE} or more."
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="right",
    )


def training_texts(kind: str, instructions: Sequence[str]) -> list[str]:
    """Prompts, and for π0.5 the numbers that can appear in them."""
    texts = prompt_texts(kind, instructions)
    return texts if kind == "pi0" else texts + [f" {number}" for number in _STATE_BINS]


def longest_prompt(tokenizer: PreTrainedTokenizerFast, kind: str, instructions: Sequence[str], state_dim: int) -> int:
    """Upper bound of a prompt's token count, <bos> and π0.5's state numbers included."""
    longest = max(len(tokenizer(text)["input_ids"]) for text in prompt_texts(kind, instructions))
    if kind == "pi0":
        return longest
    # words are tokenised on their own, so the parts add up; each number also carries its leading space and <bos>
    number = max(len(tokenizer(f" {value}")["input_ids"]) - 1 for value in _STATE_BINS)
    return longest + state_dim * number
