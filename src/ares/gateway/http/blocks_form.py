"""What the routes whose replies are written in blocks share: their one choice."""

from ares.gateway.http.generation import NewChoice
from ares.gateway.openai.block_choice import BlockChoice, PlainText
from ares.gateway.openai.blocks import BlockWriter


def block_choice(new: NewChoice, writer: BlockWriter) -> BlockChoice:
    """Make the choice of a reply in blocks, through the model's parsers where it has some."""
    parsed = new.output_format
    return BlockChoice(
        new.envelope,
        new.index,
        new.detokenizer,
        new.gateway.text,
        writer=writer,
        parser=PlainText() if parsed is None else parsed.parser(),
        hides_reasoning=parsed is not None and parsed.hides_reasoning,
        counts_reasoning=new.counts_reasoning and parsed is not None,
        **new.options,
    )
