#!lua
-- Notes that what was leased once more is handed out now: from here on it counts as tried.
-- KEYS: lease (see keys.py)
-- ARGV: holder
-- Reply: {'ok'}, or {'lost'} when the lease is not the worker's own any more
-- include: leases.lua
local lease, holder = KEYS[1], ARGV[1]

if not is_held(about_lease(lease), holder, now_of_server()) then
  return { 'lost' }
end
redis.call('HSET', lease, 'waits', '')
return { 'ok' }
