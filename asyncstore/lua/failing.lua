-- What is answered for one of many when the server has refused something in it.

-- Returns {'error', first word of the server's error} for what pcall has caught.
local function failure_of(caught)
  local text = type(caught) == 'table' and caught.err or tostring(caught)
  return { 'error', string.match(text, '^%-?(%u+)') or 'ERR' }
end
