"""Reserve the money of a call under every budget that applies to it, before the call is sent.

Owns which budgets apply, what a call may cost, and when a refusal is final. The ledger settles a
reservation with the cost of the call (ledger/charges.py); leases.py has the money.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec
from msgspec import structs

from relay.core.access import Client
from relay.core.bounds import WITHOUT_TEXT, bound_of, limits_of
from relay.core.budgets import Account, BudgetRule, BudgetRules, BudgetUse
from relay.core.dearest import other_models
from relay.core.errors import (
    BudgetBusy,
    BudgetExhausted,
    LimitsUnknown,
    ModelUnknown,
    PriceUnknown,
    StoreUnavailable,
)
from relay.core.exchange import Exchange, Request
from relay.core.formats import counting_of
from relay.core.limits import key_part
from relay.core.memo import BoundedMemo
from relay.core.metadata import HEADER as METADATA
from relay.core.metadata import as_text, metadata_of, user_of
from relay.core.meters.estimates import ESTIMATED
from relay.core.meters.sent_call import SentCall
from relay.core.peek import model_is_plain, names_one_model
from relay.core.pricing import MAX_CALL_NANO_USD, PlainRates, Tariff, usd_text
from relay.core.provider import Route
from relay.core.request_fields import RequestFields
from relay.core.text import clean
from relay.core.usage import BYTES_PER_TOKEN, CallBound
from relay.gate.leases import STORE_ERRORS, Leases
from relay.prices import price_list
from relay.prices.price_list import one_tariff
from relay.storage.budgets import BudgetState

_MAX_PLANS = 4096
_MAX_HEADER_CHARACTERS = 1024


class CallPrice(msgspec.Struct, frozen=True):
    """What calls of one model on one route have in common, until a Unix time."""

    route: Route
    model: str | None
    method: str
    until_s: float
    is_new: bool
    """True if the response reports usage of the call itself."""
    tariff: Tariff | None
    """See `one_tariff`."""
    rates: PlainRates | None
    """Those of the tariff, if tokens alone decide the cost of a call, and its size their number."""


def _price_of(request: Request, route: Route, now_s: float) -> CallPrice:
    tariff, until_s = one_tariff(route, request.model, now_s)
    is_new = counting_of(request.method, route.endpoint) == "new"
    is_text = request.kind not in WITHOUT_TEXT and request.kind != "completion"
    return CallPrice(
        route, request.model, request.method, until_s, is_new,
        tariff, tariff.plain_rates if tariff is not None and is_text else None,
    )  # fmt: skip


class BudgetPlan(msgspec.Struct, eq=False):
    """The budgets of the calls of one client, team and user. The accounts are looked up once, until
    one of them is replaced: a call under budgets that have enough money only reads them.
    """

    budgets: tuple[tuple[BudgetRule, str, str], ...]
    """The rule, the key and the subject of each."""
    is_hard: bool
    """True if one of them refuses calls."""
    accounts: tuple[Account, ...] = ()
    """Empty until a call has reserved money."""
    generation: int = -1
    """That of the leases when the accounts were looked up."""
    from_s: float = 0.0
    """When they were looked up."""
    until_s: float = 0.0
    """When a period ends, or this process may count as dead unless it writes its heartbeat."""
    price: CallPrice | None = None
    """The price of the last call, which is that of most calls."""

    def take(self, needed_nano: int, now_s: float, generation: int) -> BudgetUse | None:
        """Reserve an amount under all budgets; None if a lease has too little, or the accounts must
        be looked up again.
        """
        if generation != self.generation or not self.from_s <= now_s < self.until_s:
            return None
        is_near_limit = False
        for account in self.accounts:
            lost_nano = account.lost_nano
            if account.granted_nano - lost_nano - account.reserved_nano < needed_nano:
                return None
            if lost_nano >= account.warns_at_nano:
                is_near_limit = True
        for account in self.accounts:
            account.calls += 1
            account.reserved_nano += needed_nano
            account.used_s = now_s
        return BudgetUse(self.accounts, needed_nano, is_near_limit)


_Whose = tuple[Client | None, str, str | None, str | None]
"""What decides which budgets apply to a call: the record and the name of its client, its metadata
header, the end user that its body names."""


class Budgets:
    """The budgets of one configuration. `recorded` waits until the calls that have ended are
    settled.
    """

    def __init__(
        self, rules: BudgetRules, leases: Leases, recorded: Callable[[], Awaitable[None]]
    ) -> None:
        self._rules, self._leases, self._recorded = rules, leases, recorded
        self._names_clients = any(rule.clients for rule in rules.rules)
        self._plans = BoundedMemo(self._make_plan, _MAX_PLANS)

    def rules_of(self, record: Client | None, client: str) -> Sequence[BudgetRule]:
        """Return the rules that apply to the calls of a client: its record, if it has one, and its
        name.
        """
        rules = self._rules.rules
        own = record.rights.budgets if record is not None else ()
        if not (own or self._names_clients):
            return rules
        return [each for each in (*rules, *own) if not each.clients or client in each.clients]

    def plan_of(self, request: Request) -> BudgetPlan | None:
        """Return the budgets of a call; None if it has none."""
        caller, header = request.caller, request.headers.get(METADATA)
        whose = (caller.record, caller.client, header, request.user)
        is_long = header is not None and len(header) > _MAX_HEADER_CHARACTERS
        plan = self._make_plan(whose) if is_long else self._plans[whose]
        return plan if plan.budgets else None

    def _make_plan(self, whose: _Whose) -> BudgetPlan:
        record, client, header, named = whose
        rules = self.rules_of(record, client)
        metadata = metadata_of(header, record.rights.metadata if record is not None else {})
        team, user = as_text(metadata.get("team", "")), user_of(metadata, named)
        values = {"client": client, "team": team, "user": user}
        budgets = tuple((rule, *_key(rule, values)) for rule in rules)
        return BudgetPlan(budgets, any(rule.is_hard for rule in rules))

    def reserve(
        self, exchange: Exchange, plan: BudgetPlan, text: bytes | None, length: int,
        fields: RequestFields | None,
    ) -> Awaitable[None] | None:  # fmt: skip
        """Reserve what a call may cost under all budgets of `plan`, or nothing if one refuses.
        Returns what to wait for; None if there is enough money at hand. `text` is the body, None if
        it is not known as a whole, `length` its size, `fields` those of the text if they have been
        read.

        Raises BudgetExhausted, BudgetBusy, PriceUnknown, ModelUnknown, LimitsUnknown,
        StoreUnavailable.
        """
        request, route, leases = exchange.request, exchange.routing.route, self._leases
        assert route is not None
        now_s, price = leases.clock(), plan.price
        if (
            price is None or price.route is not route or price.model != request.model
            or price.method != request.method or now_s >= price.until_s
        ):  # fmt: skip
            price = plan.price = _price_of(request, route, now_s)
        if not price.is_new:
            return self.reserve_amount(exchange, plan, 0)
        others: tuple[str, ...] = ()
        if plan.is_hard and route.model is None:
            if text is None or request.model is None or not names_one_model(text):
                others = _check_model(exchange, text)
        rates, limits = price.rates, None
        if rates is not None and text is not None:
            limits = limits_of(request.kind, route.format, text, fields)
        if (
            rates is None or text is None
            or (limits is not None and (limits.service_tiers or not limits.is_read))
        ):  # fmt: skip
            bound = _bound_of(exchange, route.format, text, length, fields)
            if plan.is_hard and not bound.is_read:
                raise LimitsUnknown
            cost_nano = self._cost_nano(price, bound, now_s)
            if cost_nano is None and not others:
                return self.reserve_some(exchange, plan, self.unpriced_nano(request.model))
            needed_nano = self.unpriced_nano(request.model) if cost_nano is None else cost_nano
        else:
            tokens = request.input_estimate
            if tokens is None:
                tokens = request.body_bytes // BYTES_PER_TOKEN
            output = self._rules.default_output_tokens
            if limits is not None:
                output = limits.tokens(output)
            needed_nano = min(rates.nano_usd(tokens, output), MAX_CALL_NANO_USD)
        if others:
            bound = _bound_of(exchange, route.format, text, length, fields)
            needed_nano = max(needed_nano, self._others_nano(route, others, bound, now_s))
        exchange.budget = plan.take(needed_nano, now_s, leases.generation)
        return self._obtain_all(exchange, plan, needed_nano) if exchange.budget is None else None

    def _cost_nano(self, price: CallPrice, bound: CallBound, now_s: float) -> int | None:
        """Return the highest cost of a call; None if it has no price. Raises PriceUnknown."""
        if price.tariff is not None and not bound.service_tiers:
            cost = price.tariff.bound_nano_usd(bound, self._rules.default_output_tokens)
            return cost if cost is None else min(cost, MAX_CALL_NANO_USD)
        return self._dearest_nano(price.route, price.model, (bound,), now_s)

    async def reserve_some(self, exchange: Exchange, plan: BudgetPlan, needed_nano: int) -> None:
        """Reserve an amount. If that is nothing, for the price is unknown, no budget may be spent
        all the same: the provider may bill the call, and the response say at which price.

        Raises BudgetExhausted, BudgetBusy, StoreUnavailable.
        """
        await self.reserve_amount(exchange, plan, needed_nano or 1)
        if not needed_nano and exchange.budget is not None:
            exchange.budget.give_back()

    def _others_nano(
        self, route: Route, models: Sequence[str], bound: CallBound, now_s: float
    ) -> int:
        """Return the cost of a call at the dearest of these models. Raises PriceUnknown."""
        # A model that the relay replaces is not one of these: they are sent as they are.
        alternatives = tuple(replace(each, replaced_model=None) for each in route.alternatives)
        route, costs = replace(route, replaced_model=None, alternatives=alternatives), [0]
        for model in models:
            cost_nano = self._dearest_nano(route, model, (bound,), now_s)
            costs.append(self.unpriced_nano(model) if cost_nano is None else cost_nano)
        return max(costs)

    async def reserve_amount(self, exchange: Exchange, plan: BudgetPlan, needed_nano: int) -> None:
        """Reserve an amount under all budgets of `plan`, or nothing if one refuses. Raises
        BudgetExhausted, BudgetBusy, StoreUnavailable.
        """
        leases = self._leases
        exchange.budget = plan.take(needed_nano, leases.clock(), leases.generation)
        if exchange.budget is None:
            await self._obtain_all(exchange, plan, needed_nano)

    async def _obtain_all(self, exchange: Exchange, plan: BudgetPlan, needed_nano: int) -> None:
        """Do the same, and lease money where too little is at hand."""
        leases, generation = self._leases, self._leases.generation
        accounts: list[Account] = []
        try:
            for rule, key, subject in plan.budgets:
                now_s = leases.clock()
                account = leases.account(rule, key, subject, now_s)
                if needed_nano and (not leases.may_spend(now_s) or account.free_nano < needed_nano):
                    account = await self._account(rule, key, subject, needed_nano)
                account.begin(needed_nano, leases.clock())
                accounts.append(account)
        except BaseException as error:
            for account in accounts:
                account.cancel(needed_nano)
            if isinstance(error, BudgetExhausted | BudgetBusy):
                self._leases.counts.refusals[error.budget] += 1
            raise
        is_near_limit = any(account.is_near_limit for account in accounts)
        exchange.budget = BudgetUse(tuple(accounts), needed_nano, is_near_limit)
        if generation == leases.generation:
            plan.accounts, plan.generation = exchange.budget.accounts, generation
            plan.from_s = now_s = leases.clock()
            ends_s = [end_s for each in accounts if (end_s := each.span.end_s) is not None]
            plan.until_s = min([leases.usable_until(now_s), *ends_s])

    def unpriced_nano(self, model: str | None) -> int:
        """Return what a call without a price is charged. Raises PriceUnknown."""
        if self._rules.unpriced.refuses:
            raise PriceUnknown(model or "")
        return self._rules.unpriced.nano_usd

    def price_nano(
        self, route: Route, model: str | None, bounds: Iterable[CallBound]
    ) -> int | None:
        """Return the highest cost of any of `bounds`; None if none has a price. Raises
        PriceUnknown.
        """
        return self._dearest_nano(route, model, bounds, self._leases.clock())

    def _dearest_nano(
        self, route: Route, model: str | None, bounds: Iterable[CallBound], now_s: float
    ) -> int | None:
        """Return the highest cost of any of `bounds` at the dearest target of a call; None if no
        target has a price. Raises PriceUnknown if one of several has none, and calls without a
        price are refused: that one may get the call.
        """
        default, unpriced = self._rules.default_output_tokens, self._rules.unpriced
        costs = price_list.bound_costs(route, model, bounds, default, now_s)
        known = [each.nano_usd for each in costs if each.nano_usd is not None]
        unknown = [each.model or "" for each in costs if each.nano_usd is None]
        if not known:
            return None
        if unknown:
            if unpriced.refuses:
                raise PriceUnknown(unknown[0])
            known.append(unpriced.nano_usd)
        return min(max(known), MAX_CALL_NANO_USD)

    def extend_at_once(self, use: BudgetUse, more_nano: int) -> bool:
        """Reserve more for a running call, of money that is leased already. False if `extend` is
        needed.
        """
        leases, accounts = self._leases, use.accounts
        now_s = leases.clock()
        if not leases.may_spend(now_s):
            return False
        if any(each.free_nano < more_nano or not leases.owns(each) for each in accounts):
            return False
        for account in accounts:
            account.reserve(more_nano, now_s)
        use.reserved_nano += more_nano
        return True

    async def extend(
        self, use: BudgetUse, rules: Iterable[BudgetRule], more_nano: int, ahead_nano: int
    ) -> None:
        """Reserve more for a running call, under all of its budgets or under none. `rules` are
        those that apply now: a reload may have changed a rule, or removed it. `ahead_nano` is what
        the call needs beyond what it has spent, a part of which it has reserved.

        Raises BudgetExhausted, BudgetBusy, StoreUnavailable.
        """
        current = {rule.name: rule for rule in rules}
        taken: list[Account] = []
        try:
            for account in use.accounts:
                if (rule := current.get(account.rule.name)) is not None:
                    self._leases.renew(account, rule)
                    await self._fund(account, more_nano, ahead_nano)
                account.reserve(more_nano, self._leases.clock())
                taken.append(account)
            if use.is_settled:  # the call has ended in the meantime
                return
            use.reserved_nano += more_nano
            taken.clear()
        finally:
            for account in taken:
                account.release(more_nano)

    async def _account(self, rule: BudgetRule, key: str, subject: str, needed_nano: int) -> Account:
        """Return the account of a rule, with enough money for the call."""
        leases = self._leases
        try:
            if needed_nano and not leases.may_spend(leases.clock()):
                await leases.keep_alive()
            account = leases.account(rule, key, subject, leases.clock())
            if needed_nano and account.free_nano < needed_nano:
                await self._obtain(account, needed_nano)
        except STORE_ERRORS as error:
            if rule.is_hard:
                raise StoreUnavailable from error
            account = leases.account(rule, key, subject, leases.clock())
        except (BudgetExhausted, BudgetBusy):
            if rule.is_hard:
                raise  # one that warns is at MAX_SUM_NANO
        return account

    async def _fund(self, account: Account, more_nano: int, ahead_nano: int) -> None:
        """Get enough money for a running call into its account."""
        try:
            if not self._leases.may_spend(self._leases.clock()):
                await self._leases.keep_alive()
            self._leases.forget_released(account)
            if account.free_nano < more_nano:
                await self._obtain(account, more_nano, ahead_nano)
        except STORE_ERRORS as error:
            if account.rule.is_hard:
                raise StoreUnavailable from error

    async def _obtain(self, account: Account, needed_nano: int, ahead_nano: int = 0) -> None:
        """Get enough money for a call into an account, or raise what refuses the call. `ahead_nano`
        is more than `needed_nano` if a running call has reserved a part of it.
        """
        account.waiting += 1
        is_recorded = is_recalled = False
        try:
            while account.free_nano < needed_nano:
                state = await self._leases.provide(account, needed_nano)
                if state is None or account.free_nano >= needed_nano:
                    continue  # the budget has too little for others that wait
                if account.reserved_nano and not is_recorded:
                    is_recorded = True
                    await self._recorded()  # calls that have ended may still hold money
                    continue
                left_nano = _left_nano(state, account)
                if (most_nano := max(needed_nano, ahead_nano)) > left_nano:
                    raise _exhausted(account, most_nano, left_nano)
                if is_recalled or not state.others_nano:
                    raise BudgetBusy(account.rule.name)
                is_recalled = True
                await self._leases.recall(account)
        finally:
            account.waiting -= 1


def _left_nano(state: BudgetState, account: Account) -> int:
    """Return what is left of a budget when all running calls have ended, and those of this process
    have cost no more than they are known to have spent.
    """
    charged_nano = state.charged.total_nano + account.lost_nano + account.running_nano
    return state.limit_nano - charged_nano - state.unaccounted_nano


def _exhausted(account: Account, needed_nano: int, left_nano: int) -> BudgetExhausted:
    rule, left = account.rule, usd_text(max(0, left_nano))
    return BudgetExhausted(rule.name, rule.text, usd_text(needed_nano), left, account.span.end_s)


def _bound_of(
    exchange: Exchange, format_: str, text: bytes | None, length: int,
    fields: RequestFields | None,
) -> CallBound:  # fmt: skip
    """Return what a call can use at most, from what `Budgets.reserve` gets."""
    sent = structs.replace(SentCall.of(exchange), length=length)
    if text is None:
        sent = structs.replace(sent, input_tokens=length // BYTES_PER_TOKEN)
    content_type = exchange.request.headers.get("Content-Type", "")
    return bound_of(sent, format_, text, fields, content_type)


def _check_model(exchange: Exchange, text: bytes | None) -> tuple[str, ...]:
    """Raise ModelUnknown unless the provider finds the same model in the body as the relay. Returns
    the models that may answer besides.
    """
    request = exchange.request
    if text is None:
        if request.model is None:
            raise ModelUnknown
        return ()
    if not model_is_plain(text, request.headers.get("Content-Type", ""), request.model):
        raise ModelUnknown
    if request.kind not in ESTIMATED:
        return ()
    others = other_models(text)
    if others is None:
        raise ModelUnknown
    return others


def _key(rule: BudgetRule, values: Mapping[str, str]) -> tuple[str, str]:
    """Return the key of the budget of a call, and whose it is. `values` are its client, team and
    user.
    """
    client = values["client"]
    key, names = rule.name, []
    for name in rule.per:
        value = clean(values[name])
        key += f"|{key_part(value, client)}"
        names.append(f"{name}={value}" if value else f"no {name}, client={clean(client)}")
    return key, ", ".join(names) or "all"
