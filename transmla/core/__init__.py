"""The mathematics of the conversion: torch only, one layer at a time, in float64.

Symbols. Shapes are written in brackets, for example [H, d, D].

========== =============================================================================================
D          hidden size, or more generally the width of the input x that the attention reads; see F
H          query heads
G          key/value heads; query head h reads key/value head h // (H/G)
d          head width
p          d/2, rotary pairs of a head
r          ``kv_lora_rank``, width of the latent
d_r        ``qk_rope_head_dim``, width of the shared rotary key
d_n        ``qk_nope_head_dim``, width of the position-free part of a query or key
d_v        ``v_head_dim``, width of a value
N          sequences
T          tokens of a sequence
F          features that the attention's weights read. F = D for plain attention and D + 1 with biases.
           With q/k norms, F = (H + 2G)·d. A shape that names D then means F.
x          input of the attention, [N, T, D]
θ_f        rotary frequency f, in radians per position
Δ          i − j, distance from the key's position j to the query's position i
φ_h(θ)     characteristic function Σ_Δ a_h(Δ) e^{−iθΔ} of the distances that head h attends to
ψ(f, g)    φ(θ_f − θ_g) − φ(θ_f) conj(φ(θ_g)): covariance of two rotations over the distances
κ          complex keys [G, p, D]: rotary pair f of a key head as one complex map of x
s          d_r/2, rotary slots of the shared rotary key; as an index, one slot
z          complex rotary channels [s, D]: the maps of x that the shared rotary key stores
C          E[x xᵀ] [D, D], second moment of the attention's input
W_UK       ``k_up`` [H, d_n, r], up-projection of the latent to the position-free keys
W_UV       ``v_up`` [H, d_v, r], up-projection of the latent to the values
========== =============================================================================================

Steps, in the order of a conversion:

==================== ===================================================================================
rope                 RoPE as complex multiplication; layouts of rotary rows; matching of frequencies
spectrum             energies of one layer before any reduction, for ``transmla inspect``
concentrate          the rotary channels z: the principal components of the keys of each frequency
choose_slots         the same channels and their frequencies, chosen for each layer from its statistics
phase                the calibrated phase φ: the best constant in place of a rotation
linalg               low-rank approximation in the metric C: the latent and its read-out
readout              W_UK and the rotary queries of all heads, by one joint least-squares solve
methods/             complete conversion methods, built from the steps above
factors              operations on the result: query compression, padding, orthonormal latents
fit_coordinates      the coordinates in which gradient steps improve the result
norm_identity        scales that make the latent's RMSNorm an identity
reference_attention  the source's attention and MLA in plain tensor algebra, to test the fast code with
fused_attention      the same attention through PyTorch's fused kernels
exact_float64        float64 throughout, where models' code casts to float32
==================== ===================================================================================
"""
