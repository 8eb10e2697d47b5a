"""One kind of layers in the config of an export, for the tests of the plugins for vLLM and SGLang."""

KIND = {
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "inv_freq": [0.5] * 16,
    "attention_factor": 1.0,
    "latent_norm": False,
}
