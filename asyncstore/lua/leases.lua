-- What the store keeps of a handler's work on one aggregate, beside its position. The lease is a
-- hash: `holder` and `until` say who may work on it and how long (microseconds, the server's clock);
-- `token` counts the leases there were; `at` and `id` name the event at the position; `of` is the
-- sequence of the event that was handed out first, `tries` how often; `waits` is '1' as long as the
-- last of these times has not begun; `by` is the holder whose work was settled last, with a '!' if it was
-- refused, so that a second arrival is known; `again` are sequences of dead letters that are to be
-- handled again.

local function now_of_server()
  local clock = redis.call('TIME')
  return clock[1] * 1000000 + clock[2]
end

local function about_lease(lease)
  local values = redis.call('HMGET', lease,
    'holder', 'until', 'token', 'at', 'id', 'of', 'tries', 'by', 'again', 'waits')
  return {
    holder = values[1] or '', ends = tonumber(values[2]) or 0, token = tonumber(values[3]),
    at = tonumber(values[4]), id = values[5], of = tonumber(values[6]),
    tries = tonumber(values[7]) or 0, by = values[8], again = values[9] or '',
    waits = values[10] == '1',
  }
end

-- Whether the holder may still say what became of the work.
local function is_held(about, holder, now)
  return about.holder == holder and about.ends > now
end

-- Returns the next sequence of a timeline, and where it diverges from main if it does.
local function end_of(events, divergence, main)
  local count = redis.call('ZCARD', events)
  if not divergence then
    return count
  end
  local diverged_at = divergence_of(divergence)
  return diverged_at and diverged_at + count or redis.call('ZCARD', main), diverged_at
end

local function member_at(events, main, diverged_at, sequence)
  local score = string.format('%.0f', sequence)
  local from = main and sequence < (diverged_at or FAR) and main or events
  return redis.call('ZRANGE', from, score, score, 'BYSCORE')[1]
end

local function id_of(member)
  return member and string.match(member, '^%[%d+,%-?%d+,"(%x+)"') or ''
end
