#!lua flags=no-writes
-- Reads the newest snapshot, and a page of the events after it. An edition that has none of its own
-- takes one that main has from before the divergence.
-- KEYS: newest, kept and recent snapshots, events; on another edition than main also divergence,
--       the events of main, newest, kept and recent snapshots of main
-- ARGV: limit of events, the schema version that the snapshot must have, or '' for any
-- Reply: {next sequence, {field, value, ...} or {member} of the snapshot or {},
--         the sequence that the page starts at: 0 if the snapshot has another schema version,
--         {sequence to go on after or '', where it has diverged or '', member, member, ...}}
-- include: timeline.lua
-- include: page.lua
-- include: snapshots.lua
local newest, kept, recent, events, divergence = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local main, main_newest, main_kept, main_recent = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local limit, schema = tonumber(ARGV[1]), ARGV[2]

local snapshot = find_snapshot(newest, kept, recent, nil)
local next_sequence, diverged_at = redis.call('ZCARD', events), nil
if main then
  diverged_at = divergence_of(divergence)
  next_sequence = diverged_at and diverged_at + next_sequence or redis.call('ZCARD', main)
  if #snapshot == 0 then
    snapshot = find_snapshot(main_newest, main_kept, main_recent, diverged_at and diverged_at - 1)
  end
end

local sequence, version = about(snapshot)
local start = sequence and (schema == '' or schema == version) and sequence + 1 or 0
local reply = { '', diverged_at and string.format('%.0f', diverged_at) or '' }
page(reply, parts_of(events, main, diverged_at or FAR, start, math.huge), limit, false, nil)
return { next_sequence, snapshot, start, reply }
