-- Tells those who listen what was stored: where, from which sequence and how many, never the events.
-- A message is lines: domain, edition, then '{first sequence} {how many} {root}' for each append.
-- Whoever hears it reads the events; who does not finds the aggregates by the index of roots.
local BYTES_A_RING = 8192

local announced = {}

local function announce(root, first, count)
  announced[#announced + 1] = string.format('%.0f %.0f ', first, count) .. root
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
      lines, bytes = { head }, 0
    end
    lines[#lines + 1] = line
    bytes = bytes + #line
  end
  redis.pcall('SPUBLISH', channel, table.concat(lines, '\n'))
end
