#!lua
-- Marks an empty store with the version of its layout. Whoever finds a version already there, with
-- GET, needs no script: a store that takes no changes can be opened to be read.
-- KEYS: layout
-- ARGV: the version that the caller writes
-- Reply: {the version of the store}
local layout = KEYS[1]
local version = ARGV[1]

local found = redis.call('GET', layout)
if not found then
  redis.call('SET', layout, version)
  found = version
end
return { found }
