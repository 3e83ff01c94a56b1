import asyncio
import functools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ares.gateway.openai import tokenizer
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.text import TextModel
from ares.gateway.service import Gateway
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import configuration, started
from tests.gateway.running import IMPATIENT, PROMPT, VOCABULARY, FakeCluster, Run, Start, start_pool


@pytest.fixture(scope="session", autouse=True)
def one_load() -> Iterator[None]:
    """Load a tokenizer once for all gateways of the tests: it takes a process of its own, for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load", functools.cache(tokenizer.load))
        yield


@pytest.fixture
async def fakes() -> AsyncIterator[list[FakeInstance]]:
    """One prefill and two decode instances."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as started:
        yield started


@pytest.fixture
async def gateway(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    """A gateway over the fakes that notices silence soon, and decides nothing by itself."""
    made = await started(Gateway(configuration(fakes), model_folder, IMPATIENT))
    yield made
    await made.stop()


@pytest.fixture
async def cluster(fakes: list[FakeInstance]) -> AsyncIterator[FakeCluster]:
    pool, http = await start_pool(fakes, IMPATIENT)
    yield FakeCluster(fakes, pool)
    await pool.stop()
    await http.close()


@pytest.fixture
async def start(cluster: FakeCluster) -> AsyncIterator[Start]:
    runs: list[Run] = []

    def begin(
        maximum: int = 60,
        *,
        prompt: list[int] = PROMPT,
        timeout_s: float = 1.0,
        unmovable_reason: str | None = None,
        maximum_attempts: int = 3,
        **parameters: Any,
    ) -> Run:
        sampling = Sampling(parameters, maximum, 0, unmovable_reason)
        runs.append(Run(cluster, sampling, prompt, timeout_s, maximum_attempts))
        return runs[-1]

    yield begin
    for run in runs:
        run.task.cancel()
    await asyncio.gather(*(run.task for run in runs), return_exceptions=True)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: 256 byte tokens behind three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    assert len(vocabulary) == VOCABULARY
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    """A model folder with what a gateway reads: tokenizer, chat template, sampling defaults."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
        "{{ raise_exception('unknown role') }}{% endif %}{{ '<s>' + message.content + '</s>' }}{% endfor %}"
        "{% if tools is defined and tools %}[{{ tools | length }} tools]{% endif %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_p": 0.9}))
    return folder


@pytest.fixture(scope="session")
def text_model(model_folder: Path) -> TextModel:
    return TextModel(model_folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test of the gateway takes longer than this; a hang fails instead of stopping the suite."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(60))
