"""A small MetaQuery to train."""

DENOISER = dict(
    in_channels=4, sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
    cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24, mlp_ratio=2.0,
)  # fmt: skip
