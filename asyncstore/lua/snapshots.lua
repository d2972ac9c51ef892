-- Finds snapshots: the newest is a hash, older ones are members of sorted sets.

-- Returns the newest snapshot of all, or with `at` the newest whose sequence is at most that: the
-- fields and values of the hash, or one member, or nothing.
local function find_snapshot(newest, kept, recent, at)
  local sequence = at and tonumber(redis.call('HGET', newest, 'sequence'))
  if not at or (sequence and sequence <= at) then
    return redis.call('HGETALL', newest)
  end
  local highest = string.format('%.0f', at)
  local found, found_at = {}, -1
  for _, older in ipairs({ kept, recent }) do
    local member = redis.call('ZRANGE', older, highest, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
    if member[1] and tonumber(member[2]) > found_at then
      found, found_at = { member[1] }, tonumber(member[2])
    end
  end
  return found
end

local function sequence_of(digits)
  local sequence = tonumber(digits or '')
  return sequence and sequence < 2 ^ 53 and sequence or nil
end

-- Returns the sequence of a snapshot and its schema version, or nil where it can't be read.
local function about(snapshot)
  if #snapshot == 1 then
    local sequence = string.match(snapshot[1], '^%[(%d+),')
    return sequence_of(sequence), string.match(snapshot[1], '^%[%d+,%-?%d+,"%l+","%l+",(%d+)%]') or '0'
  end
  local fields = {}
  for place = 1, #snapshot, 2 do
    fields[snapshot[place]] = snapshot[place + 1]
  end
  return sequence_of(string.match(fields.sequence or '', '^%d+$')), fields.schema or '0'
end
