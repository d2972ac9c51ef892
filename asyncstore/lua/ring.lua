-- Tells those who listen what was stored: where, from which sequence and how many.
-- A message is lines: domain, edition, then '{first sequence} {how many} {root}' for each append. If
-- the events of all are small together, they come along: behind an empty line the lengths of their
-- members, and in the next line the members. Whoever hears it without them reads the events; who does
-- not hear it finds the aggregates by the index of roots.
local BYTES_A_RING = 8192
local BYTES_OF_EVENTS = 4096 -- who appends more at once is not after a few microseconds

local announced = {}
local carried, carried_lengths, carried_bytes = {}, {}, 0

-- Notes an append. `members` are scores and members by turns, nil for too many.
local function announce(root, first, count, members)
  announced[#announced + 1] = string.format('%.0f %.0f ', first, count) .. root
  if not members or carried_bytes > BYTES_OF_EVENTS then
    carried_bytes = math.huge
    return
  end
  for place = 2, #members, 2 do
    carried[#carried + 1] = members[place]
    carried_lengths[#carried_lengths + 1] = #members[place]
    carried_bytes = carried_bytes + #members[place]
  end
end

local function events_that_come_along()
  if carried_bytes > BYTES_OF_EVENTS then
    return ''
  end
  return '\n\n' .. table.concat(carried_lengths, ' ') .. '\n' .. table.concat(carried)
end

-- Sends what was announced: in one message, or a few when roots are long. If that fails, nothing
-- says so here, because the appends have not.
local function ring(channel, domain, edition)
  if #announced == 0 or channel == '' then
    return
  end
  local head = domain .. '\n' .. edition
  local lines, bytes = { head }, 0
  for _, line in ipairs(announced) do
    if bytes > BYTES_A_RING then
      redis.pcall('SPUBLISH', channel, table.concat(lines, '\n'))
      lines, bytes, carried_bytes = { head }, 0, math.huge
    end
    lines[#lines + 1] = line
    bytes = bytes + #line
  end
  redis.pcall('SPUBLISH', channel, table.concat(lines, '\n') .. events_that_come_along())
end
