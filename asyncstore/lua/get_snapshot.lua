#!lua flags=no-writes
-- Finds the newest snapshot at or before a sequence.
-- KEYS: newest, kept, recent (see keys.py)
-- ARGV: sequence, or '' for the newest of all
-- Reply: {field, value, ...} of the hash, {member} of an older one, or {}
-- include: snapshots.lua
local newest, kept, recent = KEYS[1], KEYS[2], KEYS[3]
local at = tonumber(ARGV[1])

return find_snapshot(newest, kept, recent, at)
