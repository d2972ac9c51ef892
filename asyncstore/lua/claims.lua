-- A claim says which events an append wrote that had an idempotency key, a source or a correlation
-- id. It is a member of a sorted set whose scores are all 0: '{what}\n{first sequence, in 16
-- digits} {how many}'. What is claimed has no control characters, so those of one are a range.
local function claim_of(what, first)
  return what .. '\n' .. string.format('%016.0f', first)
end

-- Returns at most `limit` claims of `what`, the first sequences first, from the one that holds the
-- sequence `start`, if there is one.
local function find_claims(claims, what, start, limit)
  local lowest, highest = '[' .. what .. '\n', '(' .. what .. '\v'
  if start > 0 then
    local at = '[' .. claim_of(what, start) .. '\v'
    local before = redis.call('ZRANGE', claims, at, lowest, 'BYLEX', 'REV', 'LIMIT', 0, 1)
    lowest = before[1] and '[' .. before[1] or lowest
  end
  return redis.call('ZRANGE', claims, lowest, highest, 'BYLEX', 'LIMIT', 0, limit)
end

-- Returns the first sequence of a claim, and how many events it names.
local function range_of(claim)
  local first, count = string.match(claim, '\n(%d+) (%d+)$')
  return tonumber(first), tonumber(count)
end
