"""Native CPU kernels: addresses and sizes in, nothing checked. Use pykd.ops."""

from collections.abc import Sequence

version: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_levels() -> list[str]: ...
def kl_div(
    student: int,
    teacher: int,
    labels: int,
    scale: int,
    losses: int,
    gradient: int,
    rows: int,
    student_classes: int,
    teacher_classes: int,
    student_stride: int,
    teacher_stride: int,
    student_dtype: int,
    teacher_dtype: int,
    direction: int,
    beta: float,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
    threads: int,
) -> int: ...
def kl_div_topk(
    student: int,
    ids: int,
    log_probs: int,
    labels: int,
    scale: int,
    losses: int,
    gradient: int,
    rows: int,
    classes: int,
    kept: int,
    student_stride: int,
    student_dtype: int,
    teacher_dtype: int,
    tail: bool,
    temperature: float,
    power: float,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
    threads: int,
) -> int: ...
def sparse_linear(
    x: int,
    bitmask: int,
    values: int,
    offsets: int,
    tail: int,
    bias: int,
    y: int,
    rows: int,
    in_features: int,
    out_features: int,
    x_stride: int,
    tail_row: int,
    value_dtype: int,
    threads: int,
) -> None: ...
def sparse_panels(
    x: int,
    pack: int,
    bias: int,
    scratch: int,
    y: int,
    rows: int,
    in_features: int,
    out_features: int,
    x_stride: int,
    threads: int,
) -> None: ...
def sparse_panels_scratch(rows: int, in_features: int, tile: int, threads: int) -> int: ...
def sparse_panels_bytes(bitmask: int, in_features: int, out_features: int, tile: int, packing: int) -> int: ...
def sparse_panels_pack(
    bitmask: int, values: int, offsets: int, in_features: int, out_features: int, tile: int, packing: int, pack: int
) -> None: ...
def sparse_codes_unpack(pack: int, in_features: int, out_features: int, dense: int) -> None: ...
def codes_packing() -> int: ...
def sparse_8bit_scratch(rows: int, in_features: int, tile: int, threads: int) -> int: ...
def sparse_8bit(
    x: int,
    x_stride: int,
    pack: int,
    scales: int,
    bias: int,
    y: int,
    scratch: int,
    rows: int,
    in_features: int,
    out_features: int,
    activation: int,
    dtype: int,
    bias_dtype: int,
    threads: int,
) -> None: ...
def sparse_4bit(
    x: int,
    bitmask: int,
    codes: int,
    offsets: int,
    scales: int,
    table: int,
    bias: int,
    y: int,
    in_features: int,
    out_features: int,
    group_size: int,
    zero_code: int,
    activation: int,
    dtype: int,
    bias_dtype: int,
    threads: int,
) -> None: ...
def bitmask_expand(
    bitmask: int,
    offsets: int,
    values: int,
    dense: int,
    in_features: int,
    out_features: int,
    element_size: int,
    threads: int,
) -> None: ...
def bitmask_gather(
    bitmask: int,
    offsets: int,
    values: int,
    dense: int,
    in_features: int,
    out_features: int,
    element_size: int,
    threads: int,
) -> None: ...
def bitmask_offsets(bitmask: int, in_features: int, out_features: int, offsets: int) -> int: ...

linear_4bit_rows: int

def linear_4bit(
    x: int,
    x_stride: int,
    packed: int,
    codebook: int,
    bias: int,
    y: int,
    scratch: int,
    rows: int,
    in_features: int,
    out_features: int,
    group_size: int,
    code: int,
    dtype: int,
    bias_dtype: int,
    threads: int,
) -> None: ...

linear_8bit_rows: int
linear_8bit_features: int

def linear_8bit(
    x: int,
    x_stride: int,
    packed: int,
    bias: int,
    y: int,
    scratch: int,
    rows: int,
    in_features: int,
    out_features: int,
    rounds: bool,
    activation: int,
    dtype: int,
    bias_dtype: int,
    threads: int,
    input_scale: float,
    input_zero: int,
) -> None: ...
def attention_scratch(length: int, dim: int) -> int: ...
def attention(
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    bias: int,
    y: int,
    scratch: int,
    batch: int,
    length: int,
    heads: int,
    dim: int,
    scale: float,
    threads: int,
) -> None: ...
def add_norm(
    x: int,
    residual: int,
    weight: int,
    bias: int,
    y: int,
    rows: int,
    size: int,
    eps: float,
    threads: int,
) -> None: ...
def encoder_layer_8bit_scratch(
    batch: int, length: int, hidden: int, heads: int, dim: int, neurons: int, threads: int
) -> int: ...
def encoder_layer_8bit(
    x: int,
    bias: int,
    y: int,
    scratch: int,
    linears: Sequence[Sequence[int]],
    input_scales: Sequence[float],
    norms: Sequence[int],
    eps: Sequence[float],
    batch: int,
    length: int,
    hidden: int,
    heads: int,
    dim: int,
    neurons: int,
    scale: float,
    threads: int,
) -> None: ...
