"""A sequence: tokens, the pages that hold their KV, and how far both are."""

from __future__ import annotations

from array import array
from enum import Enum

from services.engine.core.account import Account
from services.engine.core.api import RequestKey
from services.engine.core.blocks import BlockChain
from services.engine.core.guides import GuideState
from services.engine.core.plan import SampleSpec, ScoreSpec
from services.engine.core.prefix_waits import PrefixWait
from services.engine.sampling.params import SamplingParams


class Phase(Enum):
    """Where a sequence is. COMPUTED is a send's: all is computed, and not all is moved."""

    WAITING_FOR_GUIDE = "WAITING_FOR_GUIDE"
    WAITING_FOR_KV = "WAITING_FOR_KV"
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPUTED = "COMPUTED"
    ENDED = "ENDED"


class Sequence:
    """Tokens to compute, page by page. Those of a StartGenerate grow; those of a RemoteSend (`sampling` None) do not.

    What steps under way do to it is planned already: num_planned positions will be in the pages, and num_awaited
    tokens after those in `tokens` will be chosen.
    pages[i] holds positions [i * page_size, (i + 1) * page_size). A page that is published is never written.
    """

    __slots__ = (
        "account", "chain", "forced", "goal", "guide", "key", "num_awaited", "num_computed", "num_given", "num_planned",
        "num_prompt", "num_published", "num_told", "number", "pages", "phase", "sampling", "wait",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        key: RequestKey,
        chain: BlockChain,
        account: Account,
        *,
        goal: int,
        num_prompt: int = 0,
        sampling: SamplingParams | None = None,
        forced: tuple[int, ...] = (),
        num_told: int | None = None,
    ) -> None:
        self.number = number  # order of arrival in this engine
        self.key = key
        self.chain = chain
        self.account = account
        self.goal = goal  # positions [0, goal) are to be computed
        self.num_given = len(chain.tokens)  # tokens that came with the request
        self.num_prompt = num_prompt  # of those, the prompt; the rest is output generated elsewhere
        self.sampling = sampling
        self.forced = forced
        # Tokens of the prompt, from its first one on, whose log-probabilities are told or not wanted. None: all.
        self.num_told = num_prompt if num_told is None else num_told
        self.guide: GuideState | None = None  # once it is compiled, if the request has one
        self.phase = Phase.WAITING_FOR_KV  # until it is put into a queue
        self.wait = PrefixWait(in_line=True)
        self.pages: array[int] = array("i")
        self.num_awaited = 0
        self.num_computed = 0  # positions [0, num_computed) are in the pages
        self.num_planned = 0
        self.num_published = 0  # full pages offered to the prefix cache

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.chain.tokens

    @property
    def generates(self) -> bool:
        """Whether tokens come out of it; otherwise its KV is sent."""
        return self.sampling is not None

    @property
    def num_left(self) -> int:
        """Positions to plan before it is done or the next token is chosen."""
        return self.goal - self.num_planned

    @property
    def needs_news(self) -> bool:
        """Whether what it does next depends on what comes out of the step under way."""
        is_rated = self.num_told < self.num_prompt and self.num_planned > self.num_computed
        return is_rated or (self.guide is not None and self.num_awaited > 0)

    @property
    def match_limit(self) -> int:
        """How much of it may come from the cache: the last token before a choice is always computed (rule 5), and so
        is the one before each token of the prompt that is to be rated."""
        limit = self.goal - 1 if self.generates else self.goal
        return min(limit, self.num_told - 1) if self.num_told < self.num_prompt else limit

    @property
    def room_wanted(self) -> int:
        """Positions that it should have room for when it is admitted."""
        return self.goal + 1 if self.generates else self.goal

    def sample_spec(self, end: int) -> SampleSpec | None:
        """What to choose when positions up to `end` are computed, if that is all of them."""
        if self.sampling is None or end < self.goal:
            return None
        num_new = len(self.tokens) + self.num_awaited - self.num_given
        forced = self.forced[num_new] if self.forced else None
        allowed = self.guide.allowed if self.guide is not None else None
        return SampleSpec(self.sampling, self.tokens, self.num_prompt, forced, allowed, self.num_awaited)

    def expect(self) -> None:
        """A planned step will choose a token."""
        self.num_awaited += 1
        self.goal += 1

    def expect_no_more(self) -> None:
        """The plan that would have chosen a token was changed."""
        self.num_awaited -= 1
        self.goal -= 1

    def score_spec(self, begin: int, end: int) -> ScoreSpec | None:
        """Which tokens of the prompt are rated when positions [begin, end) are computed, where `begin` is at most
        match_limit: those that follow these positions and were not rated yet."""
        first, last = self.num_told - 1, min(end, self.num_prompt - 1)
        if self.sampling is None or self.sampling.prompt_logprobs is None or first >= last:
            return None
        return ScoreSpec(first - begin, self.tokens[first + 1 : last + 1], self.sampling.prompt_logprobs)

    def append(self, token: int) -> None:
        """Adds a token that was expected."""
        self.tokens.append(token)
        self.num_awaited -= 1

    def has_computed(self, num_tokens: int) -> None:
        """The pages that it was given hold so many positions; nothing of it is under way."""
        self.num_computed = self.num_planned = num_tokens

    def give_back(self, position: int) -> array[int]:
        """Forgets what is computed from `position` on and gives up the pages after it; the caller releases them."""
        page_size = self.chain.page_size
        num_kept = -(-position // page_size)
        given, self.pages = self.pages[num_kept:], self.pages[:num_kept]
        self.has_computed(position)
        self.num_published = min(self.num_published, position // page_size)
        return given

    def take_pages(self) -> array[int]:
        """Gives up all pages and with them everything computed; the caller releases them."""
        pages, self.pages = self.pages, array("i")
        self.num_computed = self.num_planned = self.num_published = 0
        return pages
