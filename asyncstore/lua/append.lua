#!lua
-- Appends events to aggregates of one domain and edition. Each aggregate by itself: all of its
-- events or none, and what is wrong with one does not touch the others.
-- KEYS: commits, roots, editions, domains (see keys.py), then for each aggregate its events;
--       on another edition than main also its divergence, the events of main, and its newest, kept
--       and recent snapshots; with a claim its claims; with 'c' the index of the correlation id, with
--       'e' erasing and erasures
-- ARGV: mark: 'again' when this may be the second arrival of the same call, 'elsewhere' when the first
--       was at another process of the server, else '',
--       domain, edition, how many aggregates,
--       the channel on which to tell what was stored, or '' for none,
--       then for each aggregate: root,
--         expected: the sequence that the first event must get, or '' for any,
--         how many events; with none only a commit number is written, so that a WAIT covers what was
--         there before,
--         options, a letter each: 'k', 's', 'c' for claims of a key, a source, a correlation id; 'e'
--           for that of a correlation id whose index is in another slot, and names the aggregate;
--           'm' to have the missed events with a conflict, as far as the call has room for them;
--           'd' to have something written also when the events were there before, so that a WAIT
--           covers them; then a text for each claim, in this order, and with 'e' the count of
--           erasures that was known before the index was written,
--         and two for each event: its time in microseconds ('' for the server's time), and what
--         follows the time in its member (see codec.py)
-- Reply: for each aggregate {'ok', first sequence}, which is the next one where there are no events,
--        {'duplicate', first sequence, how many} when its idempotency key was used before,
--        {'conflict', next sequence},
--        {'conflict', next sequence, then what read.lua replies from the one before expected on} with 'm', {'regressed', next
--        sequence} when that is less than expected, and the first arrival was elsewhere,
--        {'erased', count of erasures} with 'e' when there were some since, or one is under way,
--        {'error', first word of the server's error}, or {'error', 'TOOLONG'} when a second
--        arrival had too much to look through
-- include: commit.lua
-- include: timeline.lua
-- include: diverge.lua
-- include: page.lua
-- include: claims.lua
-- include: ring.lua
-- include: failing.lua
local commits, roots, editions, domains = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local mark, domain, edition, aggregates = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local channel = ARGV[5]
local key, place = 5, 6
-- include: appending.lua

local replies = {}
for index = 1, aggregates do
  local events, root, expected, first, last, options, branch, trace = next_append()
  local done, reply = pcall(append, events, root, expected, first, last, options, branch, trace)
  if done and reply[1] ~= 'ok' and trace and trace.erasures then
    pcall(claim_nothing, trace) -- the append has its answer, whatever comes of this
  end
  replies[index] = done and reply or failure_of(reply)
end
ring(channel, domain, edition)
return replies
