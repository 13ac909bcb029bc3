"""A byte-level BPE tokenizer trained on the instructions of a task suite."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"
MIN_VOCAB_SIZE = 4 + 256  # special tokens and bytes
_STATE_BINS = range(-1, 256)  # π0.5 writes the state as bin numbers; -1 is below the range


def prompt_texts(instructions: Sequence[str], state_in_prompt: bool) -> list[str]:
    """The prompts that LeRobot's processors make of instructions, without the numbers of a state.

    Args:
        instructions: Task instructions.
        state_in_prompt: Whether the prompts have a place for a state, as π0.5's may.
    """
    if not state_in_prompt:
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


def training_texts(instructions: Sequence[str], state_in_prompt: bool) -> list[str]:
    """Prompts, and the numbers that can appear in them where they have a state."""
    texts = prompt_texts(instructions, state_in_prompt)
    return texts + [f" {number}" for number in _STATE_BINS] if state_in_prompt else texts


def longest_prompt(tokenizer: PreTrainedTokenizerFast, instructions: Sequence[str], numbers: int) -> int:
    """Upper bound of a prompt's token count, <bos> and the numbers of the state in it (none: 0) included."""
    longest = max(len(ids) for ids in tokenizer(prompt_texts(instructions, numbers > 0))["input_ids"])
    if not numbers:
        return longest
    # words are tokenised on their own, so the parts add up; each number also carries its leading space and <bos>
    number = max(len(tokenizer(f" {value}")["input_ids"]) - 1 for value in _STATE_BINS)
    return longest + numbers * number
