"""Native CPU kernels: addresses and sizes in, nothing checked. Use pykd.ops."""

version: str
emulated: tuple[str, ...]

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_levels() -> list[str]: ...
def advise_huge_pages(memory: int, bytes: int) -> None: ...
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
