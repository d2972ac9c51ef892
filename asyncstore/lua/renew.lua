#!lua
-- Makes leases last longer.
-- KEYS: due, then the lease of each aggregate (see keys.py)
-- ARGV: how many microseconds they last from now on, then for each root and holder
-- Reply: {'ok' or 'lost', ...}, one for each
-- include: leases.lua
local due = KEYS[1]
local lasts = tonumber(ARGV[1])

local ends = now_of_server() + lasts
local replies = {}
for place = 2, #KEYS do
  local root, holder = ARGV[2 * place - 2], ARGV[2 * place - 1]
  if is_held(about_lease(KEYS[place]), holder, ends - lasts) then
    redis.call('HSET', KEYS[place], 'until', string.format('%.0f', ends))
    redis.call('ZADD', due, ends, root)
    replies[#replies + 1] = 'ok'
  else
    replies[#replies + 1] = 'lost'
  end
end
return replies
