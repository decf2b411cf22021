from dataclasses import dataclass
@dataclass(frozen=True)
class About:
    base: str|None=None
def write_card(*a, **k): pass
def write_adapter_card(*a, **k): pass
