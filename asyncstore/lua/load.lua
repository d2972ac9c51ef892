#!lua flags=no-writes
-- Reads the newest snapshot, and a page of the events after it.
-- KEYS: events, newest snapshot
-- ARGV: limit of events
-- Reply: {next sequence, {field, value, ...} of the snapshot or {},
--         {sequence to go on after or '', member, member, ...}}
-- include: page.lua
local events, newest = KEYS[1], KEYS[2]
local limit = ARGV[1]

local snapshot = redis.call('HGETALL', newest)
local start = '0'
for place = 1, #snapshot, 2 do
  if snapshot[place] == 'sequence' and string.match(snapshot[place + 1], '^%d+$') then
    start = '(' .. snapshot[place + 1]
  end
end

local reply = { '' }
page(reply, events, start, '+inf', tonumber(limit), false, nil)
return { redis.call('ZCARD', events), snapshot, reply }
