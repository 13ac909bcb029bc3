"""The size fields that turn LeRobot's π0 and π0.5 configurations into small ones."""

from dataclasses import dataclass

JOINT_ATTENTION_HEADS = 8  # LeRobot's joint (training) forward pass hard-codes this number


@dataclass
class SmallSizes:
    """Sizes of a small model, mixed into LeRobot's configuration classes.

    Attributes:
        vlm_width: Width of the language model.
        expert_width: Width of the action expert.
        depth: Layers of both, L.
        num_heads: Query heads of both; LeRobot supports only 8.
        head_dim: Size of an attention head (even, for rotary positions).
        mlp_dim: Hidden width of the feed-forward layers of both.
        vocab_size: Token embeddings; at least the tokenizer's size.
        vision_width: Width of the vision transformer.
        vision_depth: Its layers.
        vision_heads: Its attention heads; a divisor of `vision_width`.
        vision_mlp: Its feed-forward hidden width.
        patch_size: Side of an image patch in pixels; a divisor of the image resolution.
        tokenizer_name: Folder or Hub id with tokenizer files.
        init_scale: Linear and convolution weights start from N(0, (init_scale / √fan_in)²).
        image_resolution: (height, width) to which images are resized; square.
    """

    vlm_width: int = 64
    expert_width: int = 64
    depth: int = 2
    num_heads: int = JOINT_ATTENTION_HEADS
    head_dim: int = 16
    mlp_dim: int = 128
    vocab_size: int = 512
    vision_width: int = 64
    vision_depth: int = 2
    vision_heads: int = 4
    vision_mlp: int = 128
    patch_size: int = 16
    tokenizer_name: str = ""
    init_scale: float = 0.7
    image_resolution: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        """Validates the sizes.

        Raises:
            ValueError: If a size is not positive or does not fit the others.
        """
        super().__post_init__()  # type: ignore[misc]  # of LeRobot's configuration class, next in line
        names = ("vlm_width", "expert_width", "depth", "head_dim", "mlp_dim", "vocab_size", "vision_width")
        for name in (*names, "vision_depth", "vision_heads", "vision_mlp", "patch_size", "init_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.num_heads != JOINT_ATTENTION_HEADS:
            raise ValueError(
                f"num_heads={self.num_heads}: LeRobot's π0 forward pass supports only {JOINT_ATTENTION_HEADS} heads; "
                "change head_dim instead."
            )
        for name, multiple in (("head_dim", 2), ("expert_width", 2), ("vision_width", self.vision_heads)):
            if getattr(self, name) % multiple:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of {multiple}.")
        height, width = self.image_resolution
        if height != width or height % self.patch_size:
            raise ValueError(
                f"image_resolution={tuple(self.image_resolution)} must be square and a multiple of "
                f"patch_size={self.patch_size}."
            )
        if getattr(self, "compile_model", False):
            raise ValueError("compile_model=True is not supported by the small models; set it to False.")
