"""Count in windows of time in Redis, which several workers and machines share.

Owns the two Lua scripts that count. Redis runs a script atomically: after any failure all of it has
happened or nothing. Only the clock of Redis is used. A window is a hash that expires; its field
`born` distinguishes it from earlier windows of the same key, so that a late release does not change
a later window. gate/windows.py decides what is counted, storage/redis.py holds the connections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.storage.redis import PREFIX

if TYPE_CHECKING:
    from redis.asyncio import Redis

_TAKE = """
-- Count in every window if each has room, else in none.
-- ARGV: the name of windows that begin now; then for each key: '1' for a sliding window, its length
-- in ms, its limit, the amount.
-- Returns the index of the key that has no room, or 0; the index of a key whose value was not a
-- window (it is deleted, and a window begins), or 0; then five fields, of the key without room or
-- of every key: the window's name, its number since 1970 (0 for a fixed one), its count, the count
-- of the window before it, and the ms left.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local most, year = 2 ^ 45, 366 * 86400000
local foreign = 0

local function whole(text, most)
  local number = tonumber(text)
  return number and number >= 0 and number <= most and number == math.floor(number) and number
end

-- Return the four fields of a window and its ms left; nothing if there is no window.
local function read(at, key, slides, length)
  local held = redis.pcall('HMGET', key, 'born', 'number', 'count', 'before')
  if held.err then
    foreign = at
    redis.call('DEL', key)
    return
  end
  if not held[1] then
    return
  end
  local left, born = redis.call('PTTL', key), held[1]
  local number = whole(held[2], slides and (now + year) / length or most)
  local count, before = whole(held[3], most), whole(held[4], most)
  if left >= 0 and left <= (slides and 2 or 1) * length and number and count and before
    and #born <= 64 and not born:find('[^%w-]')
  then
    return born, number, count, before, left
  end
  foreign = at
  redis.call('DEL', key)
end

local function window(at)
  local key, slides, length = KEYS[at], ARGV[4 * at - 2] == '1', tonumber(ARGV[4 * at - 1])
  local born, last, count, before, left = read(at, key, slides, length)
  local number = 0
  if slides then
    number, left = math.floor(now / length), left and length - now % length
  end
  if not left or left <= 0 then
    return ARGV[1], number, 0, 0, slides and length - now % length or length
  end
  if last == number - 1 then
    before, count = count, 0
  elseif last < number then
    before, count = 0, 0
  end
  -- max: a clock that was set back does not reopen an earlier window.
  return born, math.max(last, number), count, before, left
end

local found = {0, 0}
for at = 1, #KEYS do
  local length, limit, amount = ARGV[4 * at - 1], tonumber(ARGV[4 * at]), tonumber(ARGV[4 * at + 1])
  local born, number, count, before, left = window(at)
  if math.floor(before * left / length) + count + amount > limit then
    return {at, foreign, born, number, count, before, left}
  end
  for _, each in ipairs({born, number, count + amount, before, left}) do
    found[#found + 1] = each
  end
end
for at = 1, #KEYS do
  local born, number, count, before, left = unpack(found, 5 * at - 2, 5 * at + 2)
  redis.call(
    'HSET', KEYS[at], 'born', born, 'number', number, 'count', count, 'before', before
  )
  if ARGV[4 * at - 2] == '1' then
    redis.call('PEXPIRE', KEYS[at], left + ARGV[4 * at - 1])
  elseif born == ARGV[1] then
    redis.call('PEXPIRE', KEYS[at], left)
  end
end
found[2] = foreign
return found
"""
_RELEASE = """
-- Count less in each window that has not ended. ARGV: for each key: its window's name and number,
-- the amount.
for at = 1, #KEYS do
  local born, number, amount = ARGV[3 * at - 2], tonumber(ARGV[3 * at - 1]), tonumber(ARGV[3 * at])
  local held = redis.pcall('HMGET', KEYS[at], 'born', 'number', 'count', 'before')
  if not held.err and held[1] == born then
    local last, count, before = tonumber(held[2]), tonumber(held[3]), tonumber(held[4])
    if last == number and count then
      redis.call('HSET', KEYS[at], 'count', math.max(0, count - amount))
    elseif last == number + 1 and before then
      redis.call('HSET', KEYS[at], 'before', math.max(0, before - amount))
    end
  end
end
return 1
"""


class RedisCharge(NamedTuple):
    """An amount to count in one window."""

    key: str
    slides: bool
    length_s: int
    limit: int
    amount: int


class WindowId(NamedTuple):
    """The identity of one window among all windows of its key: the name that its first count set,
    and the number since 1970 of a sliding window.
    """

    born: str
    number: int


class WindowState(NamedTuple):
    """The current state of one window."""

    window_id: WindowId
    counted: int
    before: int
    """The count of the window before it, for a sliding window."""
    left_s: float


class RedisWindows:
    """Windows that all processes with this Redis share. Raises the client's errors.

    A key whose value is not a window, or has impossible numbers, is deleted and reported by
    `foreign`: the limit fails open.
    """

    def __init__(
        self, client: Redis, new_id: Callable[[], str], foreign: Callable[[str], None]
    ) -> None:
        self._take = client.register_script(_TAKE)
        self._release = client.register_script(_RELEASE)
        self._new_id, self._foreign = new_id, foreign

    async def take(self, charges: Sequence[RedisCharge]) -> tuple[int | None, list[WindowState]]:
        """Count all charges and return (None, states of all windows). If one has no room, count
        nothing and return (its index, [state of that window]).
        """
        given: list[Any] = [self._new_id()]
        for each in charges:
            given += [int(each.slides), each.length_s * 1000, each.limit, each.amount]
        keys = [_key(each) for each in charges]
        full, foreign, *found = await self._take(keys, given)
        if foreign:
            self._foreign(keys[foreign - 1])
        states = [
            WindowState(WindowId(born.decode(), number), counted, before, left_ms / 1000)
            for born, number, counted, before, left_ms in zip(*[iter(found)] * 5, strict=True)
        ]
        return (full - 1 if full else None), states

    async def release(self, charges: Sequence[tuple[RedisCharge, WindowId]]) -> None:
        """Count less by the amounts of `charges`, each in its own window unless that has ended."""
        given: list[Any] = []
        for charge, window_id in charges:
            given += [window_id.born, window_id.number, charge.amount]
        await self._release([_key(charge) for charge, _ in charges], given)


def _key(charge: RedisCharge) -> str:
    technique = "sliding" if charge.slides else "fixed"
    return f"{PREFIX}:windows:{technique}:{charge.length_s}:{charge.key}"
